"""The page that shows what each augmentation does."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fer_ray.config.registries import NORMALIZATIONS
from fer_ray.config.transforms import PRESETS, magnitude_settings
from fer_ray.reporting import augmentation_page


@pytest.fixture(scope="module")
def page() -> str:
    return augmentation_page.render()


def test_the_page_shows_every_option_preset_and_normalization(page):
    options = [setting.field for setting in magnitude_settings()]
    for name in (*options, *PRESETS):
        assert page.count(f'id="{name}"') == 1, name
    for name in NORMALIZATIONS:
        assert f"--normalization {name}<" in page
    by_both = len(options) - 2 + len(PRESETS)  # without mixup and cutmix
    for engine in ("albumentations", "device"):
        assert page.count(f"<figcaption>{engine}</figcaption>") == by_both


def test_the_page_needs_nothing_from_outside(page):
    assert "http" not in page.replace("http-equiv", "")
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert sources and all(one == "data:image/png;base64," for one in sources)


def test_the_page_has_pictures_that_differ_by_what_was_done(page):
    pictures = re.findall(r'<img src="([^"]+)" alt="(\w+) by (\w+)', page)
    by_name = {(name, engine): content for content, name, engine in pictures}
    assert len(by_name) == len(pictures)
    same = {name for name, engine in by_name if engine == "device"}
    same = {n for n in same if by_name[n, "device"] == by_name[n, "albumentations"]}
    assert same == {"none"}
    assert len(set(by_name.values())) == len(by_name) - 1


def test_a_sheet_holds_the_faces_in_rows():
    import base64

    import cv2

    shown = augmentation_page.synthetic_faces(4).reshape(2, 2, 48, 48)
    content = base64.b64decode(augmentation_page.sheet(shown).split(",")[1])
    sheet = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape == (98, 98)
    assert np.array_equal(sheet[50:, :48], shown[1, 0])
