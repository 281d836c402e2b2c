"""Random arguments: every job accepts them or refuses them in one line, and never with a traceback.

The parser and the plan of each job run here, up to where Ray would start or work would begin.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
from commands import job_module
from faces import image_file

from fer_ray import cli
from fer_ray.data.dataset import read_info

ROOT = Path(__file__).resolve().parents[1]
NASTY = [
    *("", " ", "--", "-", "-1", "-0", "0", "1", "2", "00", "1e9", "1e-400", "nan", "inf", "-inf"),
    *("99999999999", "9" * 400, "2147483647", "0x10", "１２", "٣", "0.5", "1.0", "True", "none"),
    *("..", "../x", "/", "/dev/null", "/proc/self/mem", "~", "~nobody/x", "~\udcff", "a/b"),
    *("x" * 300, "file://", "file:///", "s3://", "mock://x", "mock://", "http://x/y", "gs:"),
    *("C:\\x", "*", "[1]", "\udcff", "\x1b[31m", "a\nb", "é", "😀", "a\u202eb", "%s", "{}"),
    *("auto", "cpu", "model.width"),
]
"""Values that somebody may type, or a script pass, by mistake."""
RIGHT = {
    "source": ["synthetic", "{folder}/faces.zip"],
    "data": ["{data}"],
    "checkpoint": ["{folder}/run"],
    "images": ["{folder}/faces.zip", "{folder}/run"],
    "predictions": ["{folder}/predictions"],
    "sweep": ["{folder}/sweep.toml", "normalization", "augmentation", "search"],
    "split": ["train", "validation"],
    "model.name": ["custom_cnn", "efficientnet_b2"],
}
"""For some flags, by where they are stored, values that are right."""
SOME = [
    "{folder}",
    "{folder}/file",
    "{folder}/new",
    "new",
    "new/one",
    "a",
    "b.html",
    "1",
    "3",
    "0.5",
]
"""Values that are right for one flag or another."""


class Begins(Exception):
    """A job has accepted its arguments, and its work would begin."""


def begin(*arguments: Any, **options: Any) -> None:
    raise Begins


def write_inputs(folder: Path, data: str) -> Callable[[str], str]:
    """Writes what `RIGHT` names; returns a function that fills in the paths."""
    small.write_checkpoint(read_info(data), folder / "run")
    sweep = '["transforms.normalization"]\nvalues = ["none", "minmax"]\n'
    (folder / "sweep.toml").write_text(sweep)
    (folder / "file").write_text("x")
    (folder / "predictions").mkdir()
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for number in range(24):
            archive.writestr(f"train/{'ab'[number % 2]}/{number}.png", image_file(number))
    return lambda text: text.format(folder=folder, data=data) if text != "{}" else text


def random_arguments(
    parser: argparse.ArgumentParser, fill: Callable[[str], str], pick: random.Random
) -> list[str]:
    """A list of arguments: flags of the parser, right and wrong values, in all spellings."""
    prints = (argparse._HelpAction, cli.ListModels)
    actions = [action for action in parser._actions if not isinstance(action, prints)]
    chosen = [action for action in actions if action.required and pick.random() < 0.95]
    chosen += pick.choices(actions, k=pick.choice([0, 1, 1, 2, 3]))
    arguments: list[str] = []
    for action in chosen:
        flag = pick.choice(action.option_strings)
        if action.nargs == 0 and pick.random() < 0.95:
            arguments.append(flag)
            continue
        value, spelling = fill(_value(action, pick)), pick.random()
        if spelling < 0.6:
            arguments += [flag, value]
        elif spelling < 0.95:
            arguments.append(f"{flag}={value}")
        else:
            arguments += [flag, *pick.choices([value, *NASTY], k=pick.choice([0, 2, 3]))]
    if pick.random() < 0.05:
        arguments.insert(pick.randrange(len(arguments) + 1), pick.choice(NASTY))
    return arguments


def _value(action: argparse.Action, pick: random.Random) -> str:
    kind = pick.random()
    if action.dest in RIGHT and kind < 0.9:
        return pick.choice(RIGHT[action.dest])
    if isinstance(action.metavar, str) and "|" in action.metavar and kind < 0.5:
        return pick.choice(action.metavar.split("|"))
    if kind < 0.3:
        return str(pick.choice([pick.randrange(-3, 300), pick.random(), pick.randrange(2**70)]))
    return pick.choice(NASTY if kind < 0.65 else SOME)


def stop_before_work(patch: pytest.MonkeyPatch) -> None:
    """Replaces everything that the jobs do once their arguments are accepted."""
    patch.setattr(cli, "start_ray", begin)
    for module, name in (
        ("fer_ray.training.run", "fit"),
        ("fer_ray.inference.run", "predict"),
        ("fer_ray.evaluation.run", "evaluate"),
        ("fer_ray.evaluation.report", "publish"),
        ("fer_ray.sweeps.report", "publish"),
        ("fer_ray.benchmarks.run", "measure"),
        ("fer_ray.reporting.augmentation_page", "write"),
    ):
        patch.setattr(importlib.import_module(module), name, begin)


@pytest.mark.slow
@pytest.mark.parametrize("lists", [200, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("job", ["prepare", "train", "tune", "predict", "evaluate", "benchmark"])
def test_arguments_are_accepted_or_refused_in_one_line(
    job, lists, drawn_faces, tmp_path, monkeypatch, capsys
):
    module = job_module(job)
    stop_before_work(monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    fill, pick = write_inputs(tmp_path, drawn_faces), random.Random(f"{job} {lists}")
    outcomes = {"begins": 0, "refused": 0, "ended": 0}
    for _ in range(lists):
        arguments = random_arguments(module.build_parser(), fill, pick)
        monkeypatch.setattr(sys, "argv", [f"{job}.py", *arguments])
        outcome = _outcome(module.main, arguments)
        printed = capsys.readouterr()
        outcomes[outcome] += 1
        if outcome == "refused":
            lines = printed.err.splitlines()
            assert len(lines) == 1 and lines[0].startswith(f"{job}.py: "), (arguments, printed.err)
            assert lines[0].isprintable(), arguments
    assert min(outcomes["begins"], outcomes["refused"]) > lists / 20, outcomes


def _outcome(main: Callable[[], None], arguments: list[str]) -> str:
    try:
        cli.run(main)
    except Begins:
        return "begins"
    except SystemExit as end:
        assert end.code in (0, None, cli.USER_ERROR_STATUS, cli.FAILED_STATUS), arguments
        return "refused" if end.code else "ended"
    except BaseException as error:
        raise AssertionError(f"{arguments} ended in {type(error).__name__}: {error}") from error
    return "ended"
