"""Sweeps that are killed, interrupted or out of time, and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from processes import descendants, kill_with_descendants, killing, wait_for
from sweeping import TWO, config, grid, plan, rows, same_results

from fer_ray.sweeps.run import run_sweep
from fer_ray.sweeps.store import SweepFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


TUNE = [sys.executable, str(ROOT / "jobs/tune.py"), *small.FLAGS]
TUNE += ["--warmup-epochs", "0.5", "--learning-rate", "0.05"]
COMMAND = [*TUNE, "--seeds", "2", "--epochs", "10", "--sweep", "tried.toml"]
SEARCHING = [*TUNE, "--epochs", "9", "--num-trials", "6", "--max-concurrent", "1"]
SEARCHING += ["--sweep", "searched.toml"]


def job(data: str, folder: Path, *more: str) -> subprocess.Popen:
    grid(folder, TWO)
    command = [*COMMAND, "--data", data, "--storage", str(folder / "sweeps"), *more]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_under_way(folder: Path) -> bool:
    """Whether one trial is over and another has a checkpoint."""
    trials = folder / "sweeps/tried/trials"
    return any(trials.glob("*/end.json")) and any(trials.glob("*/checkpoint_*/checkpoint.json"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = job(data, folder)
    printed, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    return folder / "sweeps/tried", printed


@pytest.mark.slow
@pytest.mark.parametrize("blow", [pytest.param("kill", marks=pytest.mark.long), "interrupt"])
def test_a_broken_off_sweep_goes_on_by_the_same_command(data, undisturbed, tmp_path, blow):
    """Every trial and epoch is there once, with the same numbers as if nothing had happened."""
    first = job(data, tmp_path)
    wait_for(lambda: is_under_way(tmp_path) or first.poll() is not None)
    if blow == "kill":
        kill_with_descendants(first)
    else:
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 130 and errors.startswith(
            "tune.py: interrupted; run the same command"
        )
        assert rows(tmp_path / "sweeps/tried")["epoch"].max() >= 1
    trials = SweepFolder(str(tmp_path / "sweeps/tried")).trials()
    over = sum(trial.is_over for trial in trials)
    assert over < 4, "too late to show anything"
    second = job(data, tmp_path)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert f"({over} trials are over" in printed
    assert same_results(tmp_path / "sweeps/tried", undisturbed[0])


@pytest.mark.slow
def test_the_job_prints_the_winners_command_and_the_folder(undisturbed):
    folder, printed = undisturbed
    lines = printed.strip().splitlines()
    assert lines[-1] == str(folder)
    assert any("jobs/train.py --data" in line for line in lines)
    assert "Traceback" not in printed and "2 at a time" in printed


@contextlib.contextmanager
def killing_the_first_trial(sweep: Path) -> Iterator[list[int]]:
    """Kills the processes of the trials that run when the first checkpoint is there."""

    def is_under_way() -> bool:
        return any(sweep.glob("trials/*/checkpoint_*/checkpoint.json"))

    with killing("ray::ImplicitFunc", is_under_way) as killed:
        yield killed


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on(data, tmp_path):
    made = plan(
        data,
        tmp_path,
        num_seeds=1,
        config=config(data, schedule={"epochs": 8}, scaling={"max_failures": 3}),
    )

    with killing_the_first_trial(Path(made.folder)) as killed:
        run_sweep(made, log=lambda line: None)
    assert killed
    found = rows(Path(made.folder))
    assert found.groupby("trial")["epoch"].apply(list).tolist() == [list(range(1, 9))] * 2
    assert (found["status"] == "finished").all()


@pytest.mark.slow
def test_a_trial_whose_process_dies_too_often_is_recorded_and_the_others_go_on(data, tmp_path):
    made = plan(
        data,
        tmp_path,
        num_seeds=1,
        config=config(data, schedule={"epochs": 12}, scaling={"max_failures": 0}),
        limits={"max_concurrent": 1},
    )

    with killing_the_first_trial(Path(made.folder)):
        run_sweep(made, log=lambda line: None)
    ends = rows(Path(made.folder)).groupby("trial").tail(1)
    assert ends["status"].tolist() == ["failed", "finished"]
    assert ends["stop_reason"].iloc[0].startswith("its process died: The actor died")


@pytest.mark.slow
def test_a_time_budget_ends_a_session_and_the_next_resumes(data, tmp_path):
    settings = config(data, schedule={"epochs": 60})
    lines: list[str] = []
    first = plan(data, tmp_path, num_seeds=1, config=settings, limits={"time_budget_s": 6})
    run_sweep(first, log=lines.append)
    assert any("are not over; run the same command to resume" in line for line in lines)
    run_sweep(plan(data, tmp_path, num_seeds=1, config=settings), log=lines.append)
    found = rows(Path(first.folder))
    assert found.groupby("trial")["epoch"].apply(list).tolist() == [list(range(1, 61))] * 2


SEARCH = """
method = "search"
space.optimizer.learning_rate = { low = 0.00001, high = 0.2, log = true }
space.transforms.normalization = ["none", "dataset"]
"""


@pytest.mark.slow
def test_a_search_stops_trials_and_goes_on_with_more(data, tmp_path):
    settings = config(data, schedule={"epochs": 9})
    run_sweep(plan(data, tmp_path, SEARCH, num_trials=8, config=settings), log=lambda line: None)
    folder = tmp_path / "tried"
    found = rows(folder)
    ends = found.groupby("trial").tail(1)
    assert set(ends["status"]) == {"finished", "stopped"}
    stopped = ends[ends["status"] == "stopped"]
    assert (stopped["epoch"] < 9).all() and stopped["stop_reason"].str.startswith("ASHA").all()
    assert (ends[ends["status"] == "finished"]["epoch"] == 9).all()
    summary = run_sweep(
        plan(data, tmp_path, SEARCH, num_trials=10, config=settings), log=lambda line: None
    )
    more = rows(folder)
    assert more["trial"].nunique() == 10 and not more.duplicated(["trial", "epoch"]).any()
    kept = more[more["trial"] < 8].reset_index(drop=True)
    assert kept.equals(found.reset_index(drop=True))
    assert summary["winner"]["settings"]["schedule.epochs"] == 9


def search_job(data: str, folder: Path) -> subprocess.Popen:
    (folder / "searched.toml").write_text(SEARCH)
    command = [*SEARCHING, "--data", data, "--storage", str(folder / "sweeps")]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.long  # a search that is paused, killed and resumed takes minutes
def test_a_search_that_is_killed_between_two_rungs_goes_on_as_if_it_had_not_been(data, tmp_path):
    """One trial at a time: the same drawn, promoted and left behind, with the same numbers."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    done = search_job(data, whole)
    printed, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    assert "ASHA promotes about one in 3 after epochs 1 and 3" in printed
    assert "paused" in printed and "not in the best third after epoch 1" in printed
    first = search_job(data, broken)
    trials = broken / "sweeps/searched/trials"
    wait_for(lambda: any(trials.glob("*/checkpoint_000002/checkpoint.json")) or first.poll() == 0)
    kill_with_descendants(first)
    stood = {trial.number: trial for trial in SweepFolder(str(broken / "sweeps/searched")).trials()}
    assert not any(trial.is_over for trial in stood.values()), "too late to show anything"
    assert sum(len(trial.history) == 1 for trial in stood.values()) >= 2, "some are paused"
    second = search_job(data, broken)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert "(0 trials are over, " in printed
    assert same_results(whole / "sweeps/searched", broken / "sweeps/searched")
    found = rows(broken / "sweeps/searched")
    assert not found.duplicated(["trial", "epoch"]).any() and found["trial"].nunique() == 6
    for number, before in stood.items():  # what was trained before was not trained again
        kept = found[found["trial"] == number]["seconds"].tolist()[: len(before.history)]
        assert kept == [row["seconds"] for row in before.history]


@pytest.mark.slow
def test_trials_of_several_workers_pause_and_go_on_without_leaving_their_workers(data, tmp_path):
    """A trainer in a trial that pauses, or is killed, must not keep its CPUs.

    The next trial, or this one begun again, would wait for them for ever.
    """
    settings = config(
        data,
        schedule={"epochs": 4},
        scaling={"num_workers": 2, "cpus_per_worker": 1.0},
    )
    made = plan(
        data,
        tmp_path,
        'method = "search"\nspace.optimizer.learning_rate = [0.05, 0.00001]',
        num_trials=3,
        config=settings,
    )
    lines: list[str] = []
    with killing_the_first_trial(Path(made.folder)) as killed:
        run_sweep(made, log=lines.append)
    assert killed
    assert any("1 at a time" in line for line in lines)
    found = rows(Path(made.folder))
    ends = found.groupby("trial").tail(1)
    assert len(ends) == 3 and set(ends["status"]) == {"finished", "stopped"}
    assert (ends[ends["status"] == "finished"]["epoch"] == 4).all()
    assert (ends[ends["status"] == "stopped"]["epoch"] == 1).all()
    assert not found.duplicated(["trial", "epoch"]).any()
    assert any("paused" in line for line in lines)
    wait_for(lambda: not descendants(os.getpid(), "ray::RayTrainWorker"), 30)
