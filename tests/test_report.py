"""The report: whole, escaped, self-contained, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import prediction_samples as samples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fer_ray.errors import UserError
from fer_ray.evaluation import figures, report, run
from fer_ray.reporting import html as pages
from fer_ray.reporting import svg

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluate(path: Path) -> run.Evaluation:
    return run.evaluate([str(path)], resamples=200)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Predictions of two runs, a dataset with their images, a history of the first."""
    root = tmp_path_factory.mktemp("report")
    first = samples.random_table(1, 200, skill=2.5, run="custom_cnn", failed=[3])
    samples.save(root / "predictions", first)
    second = samples.random_table(2, 200, skill=1.0, run="sequential_cnn")
    samples.save(root / "predictions", second)
    images = np.random.default_rng(0).integers(0, 256, (200, 48, 48), np.uint8)
    samples.save_dataset(root / "data", second, images)
    samples.save_history(root / "runs", "custom_cnn")
    np.save(root / "images.npy", images)
    return root


@pytest.fixture(scope="module")
def html(path: Path) -> str:
    result = evaluate(path / "predictions")
    return report.render(result, runs=str(path / "runs"), data=str(path / "data"))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_it_shows_the_numbers_of_the_evaluation(path: Path, page: Page):
    result = evaluate(path / "predictions")
    for score in result.scores:
        for estimate in score.estimates.values():
            assert f"{100 * estimate.value:.1f}" in page.text
            assert f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}" in page.text
        assert f"{score.nll.value:.3f}" in page.text
        assert score.run in page.text
    assert "custom_cnn is" in page.text and "points more accurate than sequential_cnn" in page.text
    assert "1 of 200 images could not be predicted" in page.text
    assert "sequential_cnn: no training history was found" in page.text


def test_nothing_comes_from_outside(html: str, page: Page):
    assert "http:" not in html and "https:" not in html
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    sources = [attributes["src"] or "" for _, attributes in page.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    links = [attributes["href"] or "" for _, attributes in page.tags if "href" in attributes]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", html)
    policy = [one["content"] for one in page.all("meta") if "http-equiv" in one]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_figures_are_described_and_ids_are_unique(page: Page):
    drawings = page.all("svg")
    # One split: accuracy, classes, two matrices; three learning curves.
    assert len(drawings) == 7
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in drawings)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for reference in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert reference in ids
    assert all(one["alt"] for one in page.all("img"))
    assert all(one.get("scope") for one in page.all("th"))


def test_no_placeholder_colour_is_left(html: str):
    for placeholder in svg._VARIABLES:
        assert placeholder not in html


def test_gallery_shows_the_most_confident_mistakes(path: Path):
    score = evaluate(path / "predictions").scores[1]
    images = np.load(path / "images.npy")
    hashes = [f"{number:064x}" for number in range(200)]
    ids = [f"images/{number:05d}.jpg" for number in range(200)]
    gallery = report.mistakes(score, dict(zip(ids, zip(hashes, images))), most=5)
    frame = pd.read_parquet(path / "predictions" / "sequential_cnn" / "validation")
    wrong = frame[frame["correct"].eq(False)].nlargest(5, "confidence")
    assert [mistake.image_id for mistake in gallery] == wrong["image_id"].tolist()
    assert [mistake.label for mistake in gallery] == wrong["label"].tolist()
    for mistake in gallery:
        content = np.frombuffer(_decoded(mistake.image), np.uint8)
        decoded = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)
        assert (decoded == images[ids.index(mistake.image_id)]).all()


def _decoded(uri: str | None) -> bytes:
    import base64

    assert uri is not None
    return base64.b64decode(uri.removeprefix("data:image/png;base64,"))


def test_a_different_image_under_the_same_id_is_not_shown(path: Path):
    score = evaluate(path / "predictions").scores[1]
    image = np.zeros((48, 48), np.uint8)
    others = dict.fromkeys(score.rows.index, ("f" * 64, image))
    assert {mistake.image for mistake in report.mistakes(score, others)} == {None}


def test_without_a_dataset_no_image_is_in_the_page(path: Path):
    bare = Page(report.render(evaluate(path / "predictions")))
    assert not bare.all("img")
    assert len(bare.all("svg")) == 4


def test_large_images_are_reduced():
    uri = pages.png_data_uri(np.random.default_rng(0).integers(0, 256, (500, 400), np.uint8))
    shape = cv2.imdecode(np.frombuffer(_decoded(uri), np.uint8), cv2.IMREAD_GRAYSCALE).shape
    assert shape == (128, 102)


def test_names_from_data_are_escaped(tmp_path: Path):
    labels = ("$\\frac{$", HOSTILE, 'a" onload="x', "b--><b>")
    rows = samples.random_table(
        1, 60, skill=1.0, labels=labels, image_ids=[f"{HOSTILE}{n}" for n in range(60)]
    )
    samples.save(tmp_path, rows, labels)
    page = Page(report.render(evaluate(tmp_path)))
    assert not page.all("img")
    assert not any(name.startswith("on") for _, one in page.tags for name in one)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed"})
    assert page.text.count(HOSTILE) > 4  # in tables, figures and the list of mistakes
    assert "$\\frac{$" in page.text


def test_the_same_evaluation_gives_the_same_page(path: Path, html: str):
    again = report.render(
        evaluate(path / "predictions"), runs=str(path / "runs"), data=str(path / "data")
    )
    assert again == html


def test_figures_are_well_formed_whatever_the_runs(tmp_path: Path):
    labels = ("only", "never seen", "third")
    rows = samples.table(["only"] * 4, np.eye(3)[[0, 0, 1, 2]], labels=labels, run="x" * 80)
    samples.save(tmp_path, rows, labels)
    samples.save(tmp_path, samples.table([None], np.eye(3)[:1], labels=labels, run="b"), labels)
    result = evaluate(tmp_path)
    scored = [score for score in result.scores if score.num_scored]
    runs = [score.run for score in result.scores]
    for figure in (
        figures.accuracy_dots(scored, runs),
        figures.class_f1_bars(scored, runs),
        figures.confusion_heatmap(scored[0]),
    ):
        root = ET.fromstring(figure)
        assert root.attrib["viewBox"].startswith("0 0 ")
    assert "50 %" in "".join(ET.fromstring(figures.confusion_heatmap(scored[0])).itertext())
    assert Page(report.render(result)).text.count("–") >= 4


def test_a_file_that_is_no_history_is_refused(tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "history.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="is damaged: it cannot be read as Parquet"):
        report.read_trainings(str(tmp_path), ["one"], [])
    pq.write_table(pa.table({"epoch": [1]}), tmp_path / "one" / "history.parquet")
    with pytest.raises(UserError, match="not a training history"):
        report.read_trainings(str(tmp_path), ["one"], [])


# -- in a browser ---------------------------------------------------------------------------

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
]


def browse(tmp_path: Path, file: Path, *flags: str) -> str:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not on the PATH")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_the_numbers(path: Path, html: str, tmp_path: Path):
    file = tmp_path / "report.html"
    file.write_text(html)
    page = Page(browse(tmp_path, file, "--dump-dom"))
    for score in evaluate(path / "predictions").scores:
        assert f"{100 * score.accuracy.value:.1f}" in page.text
        assert f"{score.nll.value:.3f}" in page.text
    assert len(page.all("svg")) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(1200, []), (500, ["--force-dark-mode"])])
def test_a_browser_draws_the_page(html: str, tmp_path: Path, width: int, theme: list[str]):
    file, screenshot = tmp_path / "report.html", tmp_path / "page.png"
    file.write_text(html)
    browse(tmp_path, file, f"--screenshot={screenshot}", f"--window-size={width},4000", *theme)
    drawn = cv2.imread(str(screenshot))
    assert drawn.shape[1] == width
    assert (drawn[0, 0].mean() < 60) == bool(theme)  # the background follows the theme
    # Colours of the first run's marks, and text down the whole page.
    different = np.abs(drawn.astype(int) - drawn[0, 0]).sum(axis=2) > 60
    assert (different.any(axis=1).reshape(-1, 400).mean(axis=1) > 0.2).all()
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 200
