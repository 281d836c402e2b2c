"""A sweep's page and text, and the job that makes them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
import sweep_samples as samples
from conftest import ROOT
from sweep_samples import BASE, CLAHE, MINMAX, read_page, saved, table
from test_report import HOSTILE, Page, browse

from fer_ray.errors import UserError
from fer_ray.reporting import svg
from fer_ray.sweeps import report, sentences, store, summary
from fer_ray.sweeps.figures import finished_in_order
from fer_ray.sweeps.space import Arm, Range
from fer_ray.sweeps.store import SweepFolder, Trial


def test_summary_json_is_json_without_nan(grid: Path, search: Path):
    for folder in (grid, search):
        made = summary.write(str(folder))
        text = (folder / store.SUMMARY).read_text()
        assert "NaN" not in text and "Infinity" not in text
        assert json.loads(text) == made


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_the_page_needs_nothing_and_shows_the_numbers(kind: str, request):
    folder = request.getfixturevalue(kind)
    made, path = report.publish(str(folder))
    assert path == str(folder / "report.html")
    html = read_page(folder)
    page = Page(html)
    text = page.text.replace("\u00a0", " ")
    assert "http:" not in html and "https:" not in html and "src=" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert "/machine" not in html and str(folder) not in html
    assert page.all("meta")[2]["content"].startswith("default-src 'none'")
    for line in [*made["conclusions"], *made["caveats"], made["winner"]["command"]]:
        assert line in text
    for arm in made.get("arms", [])[1:]:
        assert sentences.compared(arm, made) in text
        assert f"{100 * arm['accuracy']['mean']:.1f}" in text
    assert len(page.all("svg")) == 3
    assert all(
        one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in page.all("svg")
    )
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(one.get("scope") for one in page.all("th"))
    for stand_in in svg._VARIABLES:
        assert stand_in not in html
    report.publish(str(folder))
    assert read_page(folder) == html


def test_names_from_data_are_escaped(tmp_path: Path):
    arms = tuple(
        Arm(name=name, options={"transforms.flip": number / 10})
        for number, name in enumerate((HOSTILE, "$\\frac{$", "b--><b>"))
    )
    values = {arms[0].name: [0.5, 0.51], arms[1].name: [0.5, HOSTILE], arms[2].name: [0.5, 0.53]}
    folder = saved(tmp_path, table(values), seeds=[0, 1], arms=arms)
    report.publish(str(folder))
    page = Page(read_page(folder))
    assert not page.all("img") and not page.all("b--><b")
    assert not any(name.startswith("on") for _, one in page.tags for name in one)
    assert HOSTILE in page.text and "$\\frac{$" in page.text


def test_figures_are_well_formed(tmp_path: Path):
    values = {BASE: ["a", "b"], MINMAX: [0.5, None], CLAHE: [0.5, 0.52]}
    folder = saved(tmp_path, table(values), seeds=[0, 1])
    report.publish(str(folder))
    drawn = re.findall(r"<svg.*?</svg>", read_page(folder), re.DOTALL)
    assert drawn and all(ET.fromstring(one).attrib["viewBox"] for one in drawn)


def test_epochs_are_counted_as_they_were_spent(tmp_path: Path):
    """A trial that ASHA promotes late ends late, whatever its number."""

    def trial(number: int, ends: list[int], status: str) -> Trial:
        rows = samples.history(0.5 + number / 10, len(ends))
        times = [datetime.datetime.fromtimestamp(end, datetime.UTC) for end in ends]
        history = [{**row, "ended_at": time} for row, time in zip(rows, times)]
        return Trial(number=number, arm=None, options={"schedule.seed": 0, "transforms.flip": 0.5},
                     status=status, history=history)  # fmt: skip

    given = [
        trial(0, [1, 8, 9], store.FINISHED),
        trial(1, [2], store.STOPPED),
        trial(2, [3, 4, 5], store.FINISHED),
        trial(3, [6, 7], store.FAILED),
    ]
    ranges = {"transforms.flip": Range(low=0.0, high=1.0)}
    config = samples.base(schedule={"epochs": 3})
    folder = samples.save(tmp_path / "s", given, config=config, ranges=ranges)
    ended = finished_in_order(SweepFolder(str(folder)).read_table())
    assert ended[["trial", "spent"]].to_numpy().tolist() == [[2, 5], [0, 9]]
    report.publish(str(folder))
    assert "Each finished trial at the time of its end" in read_page(folder)
    untimed = [dataclasses.replace(one, history=samples.history(0.5, len(one.history)))
               for one in given]  # fmt: skip
    samples.save(folder, untimed, config=config, ranges=ranges)
    ended = finished_in_order(SweepFolder(str(folder)).read_table())
    assert ended[["trial", "spent"]].to_numpy().tolist() == [[0, 3], [2, 7]]
    report.publish(str(folder))
    assert "Trials in the order of their numbers" in read_page(folder)


def test_the_page_replaces_nothing_else(grid: Path, tmp_path: Path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="holds an evaluation"):
        report.publish(str(grid), str(tmp_path / "evaluation"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report.publish(str(grid), str(tmp_path / "file"))
    for output, page in (("new", "new/report.html"), ("page.html", "page.html")):
        assert report.publish(str(grid), str(tmp_path / output))[1] == str(tmp_path / page)
        assert (tmp_path / page).read_text().startswith("<!doctype html>")


def test_the_text_has_every_arm_and_the_command(grid: Path):
    made = summary.summarize(str(grid))
    text = sentences.as_text(made)
    for arm in made["arms"]:
        assert re.search(rf"^{re.escape(arm['arm'])} +3 +{100 * arm['accuracy']['mean']:.1f} ",
                         text, re.MULTILINE)  # fmt: skip
    assert text.endswith(made["winner"]["command"])


# -- the jobs -------------------------------------------------------------------------------


def job(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_job_makes_the_report(grid: Path, tmp_path: Path):
    done = job("evaluate.py", "--sweep", str(grid), "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert "no effect shown" not in done.stderr and CLAHE in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


WRONG = {
    "neither": ("evaluate.py", [], "exactly one of --predictions and --sweep"),
    "both": ("evaluate.py", ["--sweep", "x", "--predictions", "y"], "exactly one"),
    "no sweep": ("evaluate.py", ["--sweep", "absent"], "not a sweep: sweep.json is missing"),
    "data too": ("evaluate.py", ["--sweep", "x", "--data", "y"], "go with --predictions"),
    "no summary": (
        "train.py",
        ["--data", "x", "--from-sweep", "absent"],
        "summary.json is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_mistakes_end_in_one_line_and_status_2(case: str, tmp_path: Path):
    name, arguments, message = WRONG[case]
    done = job(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{name}: ") and message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "search"])
@pytest.mark.parametrize(("width", "theme"), [(1200, []), (500, ["--force-dark-mode"])])
def test_a_browser_draws_the_page(kind: str, request, tmp_path: Path, width: int, theme: list):
    folder = request.getfixturevalue(kind)
    _, page = report.publish(str(folder), str(tmp_path))
    picture = tmp_path / "page.png"
    browse(tmp_path, Path(page), f"--screenshot={picture}", f"--window-size={width},3000", *theme)
    drawn = cv2.imread(str(picture))
    assert drawn.shape[1] == width
    assert (drawn[0, 0].mean() < 60) == bool(theme)  # the background follows the theme
    different = np.abs(drawn.astype(int) - drawn[0, 0]).sum(axis=2) > 60
    assert (different.any(axis=1).reshape(-1, 300).mean(axis=1)[:5] > 0.2).all()
