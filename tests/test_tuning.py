"""Sweeps on Ray Tune: the fast tests plan and run one small grid, the slow ones break things."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import small
from processes import descendants, kill_with_descendants, wait_for

from fer_ray import checkpoint, shared_images, storage, worker
from fer_ray.config import TrainConfig
from fer_ray.errors import UserError
from fer_ray.sweeps import planning, preflight, progress, records, trial, tuning
from fer_ray.sweeps.halving import Halving, Job
from fer_ray.sweeps.planning import Limits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


def config(data: str, **sections) -> TrainConfig:
    values = small.config(**sections).to_dict()
    values["schedule"]["global_batch_size"] = 16
    return TrainConfig.from_dict({**values, "data": data})


def grid(folder: Path, text: str) -> str:
    """A sweep's file."""
    place = folder / "tried.toml"
    place.write_text(text)
    return str(place)


TWO = "space.transforms.normalization = ['none', 'minmax']"


def plan(data: str, folder: Path, sweep: str = TWO, **settings) -> planning.SweepPlan:
    base = settings.pop("config", None) or config(data)
    limits = Limits(**settings.pop("limits", {}))
    return planning.plan(
        base,
        sweep=sweep if sweep in ("normalization", "search") else grid(folder, sweep),
        storage_place=str(folder),
        limits=limits,
        **settings,
    )


def rows(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "trials.parquet").to_pandas()


MEASURED = ["images_per_s", "seconds"]


def same_results(first: Path, second: Path) -> bool:
    """Whether two sweeps say the same, but for what was measured by the clock."""
    tables = [rows(folder).drop(columns=MEASURED) for folder in (first, second)]
    return tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_trials": 5}, "has 2 arms x 3 seeds = 6 trials; --seeds changes that"),
        ({"sweep": "search", "num_seeds": 2}, "a search trains each configuration once"),
        ({"run": "a/b"}, "not a plain name"),
        ({"sweep": "space.schedule.global_batch_size = [16, 500]"}, "500 is more than the 320"),
        ({"train_fraction": 0.04}, "16 is more than the 12 images of --train-fraction 0.04"),
        (
            {"limits": {"gpus_per_trial": 0.5}, "config": {"num_workers": 2}},
            "each worker has a GPU",
        ),
    ],
)
def test_a_plan_refuses_what_could_not_be_trained(data, tmp_path, settings, reason):
    if "config" in settings:
        settings = {**settings, "config": config(data, scaling=settings["config"])}
    with pytest.raises(UserError, match=reason):
        plan(data, tmp_path, **settings)


def test_streams_and_remote_tensorboards_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="share the images in memory"):
        plan(data, tmp_path, config=config(data, schedule={"loading": "stream"}))
    with pytest.raises(UserError, match="writes to a local --storage only"):
        planning.plan(
            config(data),
            sweep="normalization",
            storage_place=f"file://{tmp_path}",
            limits=Limits(tensorboard=True),
        )


@pytest.mark.parametrize(
    ("scaling", "limits"),
    [({"cpus_per_worker": 3.0}, {}), ({}, {"gpus_per_trial": 0.5}), ({"num_workers": 3}, {})],
)
def test_what_never_fits_is_refused_before_anything_is_written(data, tmp_path, scaling, limits):
    made = plan(data, tmp_path, config=config(data, scaling=scaling), limits=limits)
    with pytest.raises(UserError, match="wanted, the cluster has"):
        tuning.fit(made, say=lambda line: None)
    assert not storage.exists(made.folder)


def test_trials_at_once_are_what_fits(data, tmp_path):
    def at_once(scaling: dict, **limits) -> int:
        made = plan(data, tmp_path, config=config(data, scaling=scaling), limits=limits)
        return preflight.trials_at_once(made, print)

    assert at_once({}) == 2
    assert at_once({"cpus_per_worker": 0.5}) == 4
    assert at_once({"cpus_per_worker": 0.1}) == 6, "there are no more trials"
    assert at_once({"cpus_per_worker": 0.5}, max_concurrent=3) == 3
    assert at_once({"num_workers": 2}) == 1


def test_a_part_of_the_train_split_has_its_share_of_each_class():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 3 + [-1] * 50)
    kept = shared_images.stratified(labels, 0.2, seed=1)
    assert np.bincount(labels[kept]).tolist() == [20, 2, 1]
    assert (np.diff(kept) > 0).all()
    assert kept.tolist() == shared_images.stratified(labels, 0.2, seed=1).tolist()
    assert kept.tolist() != shared_images.stratified(labels, 0.2, seed=2).tolist()
    everything = shared_images.stratified(labels, 1.0, seed=1)
    assert everything.tolist() == np.flatnonzero(labels >= 0).tolist()


HALF = """
space.optimizer.learning_rate = [0.05, 100.0]
space.optimizer.clip_grad_norm = [0.0]
space.optimizer.ema_decay = [0.0]
"""


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """A grid of which one arm's loss cannot stay finite, and what it said."""
    folder, said = tmp_path_factory.mktemp("sweeps"), []
    settings = config(data, model={"name": "sequential_cnn"}, optimizer={"warmup_epochs": 0})
    made = plan(data, folder, HALF, num_seeds=2, config=settings, limits={"tensorboard": True})
    summary = tuning.fit(made, say=said.append)
    return Path(made.folder), summary, said, settings


def test_every_trial_and_epoch_is_a_row_and_a_failure_is_recorded(swept, data):
    folder, summary, said, _ = swept
    assert pq.read_schema(folder / "trials.parquet").equals(records.SCHEMA)
    found = rows(folder)
    assert len(found[found["epoch"] > 0].groupby("trial")) >= 2
    good = found[found["learning_rate"] == 0.05]
    assert good[["trial", "seed", "epoch"]].to_numpy().tolist() == [
        *([0, 0, 1], [0, 0, 2], [2, 1, 1], [2, 1, 2])
    ]
    assert (good["status"] == "finished").all() and good["stop_reason"].isna().all()
    assert (good["model"] == "sequential_cnn").all() and (good["images_per_s"] > 0).all()
    bad = found[found["learning_rate"] == 100.0]
    assert set(bad["trial"]) == {1, 3} and (bad["status"] == "failed").all()
    assert bad["stop_reason"].str.contains(r"not finite at step \d+").all()
    assert summary["trials"]["failed"] == 2 and summary["trials"]["finished"] == 2
    assert sum("failed" in line and "not finite" in line for line in said) == 2
    assert any("2 arms x 2 seeds = 4 trials of 2 epochs" in line for line in said)
    assert any("2 at once; 8 epochs to run" in line for line in said)


def test_nothing_is_left_but_the_records(swept):
    folder, *_ = swept
    names = {path.name for path in folder.iterdir()}
    assert names == {"sweep.json", "summary.json", "trials.parquet", "trials", "tensorboard"}
    for place in (folder / "trials").iterdir():
        kept = {path.name for path in place.iterdir()}
        assert kept <= {"trial.json", "history.parquet", "end.json"}


def test_tensorboard_has_every_epoch(swept):
    from tensorboardX.proto import event_pb2

    folder, *_ = swept
    (file,) = (folder / "tensorboard" / "00000").iterdir()
    content, steps = file.read_bytes(), set()
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        steps |= {event.step for value in event.summary.value if "validation_acc" in value.tag}
        content = content[16 + size :]
    assert steps == {1, 2}


def test_the_same_command_runs_nothing_again_and_more_seeds_go_on(swept, data, monkeypatch):
    folder, _, _, settings = swept
    before = (folder / "trials.parquet").read_bytes()
    started: list[int] = []
    monkeypatch.setattr(tuning, "_run_trials", lambda *given: started.append(1))
    again = plan(data, folder.parent, HALF, num_seeds=2, config=settings)
    tuning.fit(again, say=lambda line: None)
    assert not started and (folder / "trials.parquet").read_bytes() == before
    said: list[str] = []
    tuning.fit(plan(data, folder.parent, HALF, num_seeds=3, config=settings), say=said.append)
    assert started == [1]
    assert any("4 epochs to run (4 trials are over" in line for line in said)
    trials = records.read_all(str(folder))
    assert [trial.options["schedule.seed"] for trial in trials] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match=r"seeds: \[0, 1, 2\] -> \[0\], more but not fewer"):
        plan(data, folder.parent, HALF, num_seeds=1, config=settings)


def test_a_live_table_is_erased_whole_and_never_wraps(swept, data, monkeypatch, capsys):
    folder, *_ = swept
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    halving = Halving((2,), 9, records.read_all(str(folder)))
    shown = progress.Progress(str(folder), config(data), halving, say=lambda line: None)
    shown.on_trial_start(0, [], tuned(0, 2))
    shown._draw()
    drawn = capsys.readouterr().out.splitlines()
    assert len(drawn) == len(shown.table()) == 2
    assert all(0 < len(line) < 40 for line in drawn)
    assert max(map(len, shown.table())) > 40, "nothing had to be cut"
    shown.close()
    assert capsys.readouterr().out == "\x1b[2F\x1b[J"


def tuned(number: int, until: int) -> SimpleNamespace:
    """What Ray Tune calls a trial."""
    return SimpleNamespace(config={"number": number, "until": until})


def test_the_table_tells_what_is_paused_and_what_was_promoted(tmp_path):
    sweep, said = str(tmp_path), []
    row = {**dict.fromkeys(records.METRICS, 0.5), "learning_rate": 0.1, "images_per_s": 900.0}
    for number in range(4):
        made = records.Trial(number=number, arm=None, options={"schedule.seed": 0})
        records.create(sweep, made)
    history = [{**row, "epoch": epoch} for epoch in (1, 2)]
    for number in range(3):
        records.save(records.folder_of(sweep, number), 1, history[:1], lambda place: None)
    halving = Halving((1, 3, 9), 9, records.read_all(sweep))
    shown = progress.Progress(sweep, small.config(), halving, say=said.append)
    for number, until in ((0, 3), (3, 1)):
        assert halving.next() == Job(number=number, until=until)
        shown.on_trial_start(0, [], tuned(number, until))
    shown.on_trial_result(0, [], tuned(0, 3), history[1])
    first, second, last = shown.table()
    assert first == "  trial 0, promoted: epoch 2/3 of 9, 50.00%, 900 images/s"
    assert second == "  trial 3: epoch 0/1 of 9"
    # 1 of trial 0, 1 of trial 3, 5 new trials, 2 more to epoch 3, 1 to the end
    assert last.startswith("  0 of 9 trials over, 2 paused; 17 epochs to run, about ")
    records.save(records.folder_of(sweep, 3), 1, history[:1], lambda place: None)
    shown.on_trial_complete(0, [], tuned(3, 1))
    assert said[0] == "trial 3 paused: 50.00% after 1 epoch, 0 s"
    said.clear()
    shown.on_trial_complete(0, [], tuned(1, 3))  # the time budget ended before it began
    shown.on_trial_complete(0, [], tuned(0, 3))
    assert not said


def test_another_sweep_under_the_same_name_is_refused_and_shown(swept, data):
    folder, _, _, settings = swept
    longer = config(
        data,
        model={"name": "sequential_cnn"},
        optimizer={"warmup_epochs": 0},
        schedule={"epochs": 3},
    )
    with pytest.raises(UserError, match=r"schedule\.epochs: 2 -> 3"):
        plan(data, folder.parent, HALF, num_seeds=3, config=longer)
    with pytest.raises(UserError, match="arms: other than before"):
        plan(data, folder.parent, TWO, num_seeds=3, config=settings)
    with pytest.raises(UserError, match="train_fraction: other than before"):
        plan(data, folder.parent, HALF, num_seeds=3, config=settings, train_fraction=0.5)


COMMAND = [sys.executable, str(ROOT / "jobs/tune.py"), "--width", "4", "--seeds", "2"]
COMMAND += ["--epochs", "10", "--global-batch-size", "8", "--precision", "float32"]
COMMAND += ["--warmup-epochs", "0.5", "--learning-rate", "0.05", "--sweep", "tried.toml"]


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
        assert first.returncode == 130 and errors.strip() == "tune.py: interrupted"
        assert rows(tmp_path / "sweeps/tried")["epoch"].max() >= 1
    trials = records.read_all(str(tmp_path / "sweeps/tried"))
    over = sum(trial.is_over for trial in trials)
    assert over < 4, "too late to show anything"
    second = job(data, tmp_path)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert f"({over} trials are over" in printed
    assert same_results(tmp_path / "sweeps/tried", undisturbed[0])


@pytest.mark.slow
def test_the_job_ends_with_the_winners_command_and_the_place(undisturbed):
    folder, printed = undisturbed
    lines = printed.strip().splitlines()
    assert lines[-1] == str(folder)
    assert any("jobs/train.py --data" in line for line in lines)
    assert "Traceback" not in printed and "2 at once" in printed


@contextlib.contextmanager
def killing_the_first_trial(sweep: Path) -> Iterator[list[int]]:
    """Kills the processes of the trials that run when the first checkpoint is there."""
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: any(sweep.glob("trials/*/checkpoint_*/checkpoint.json")))
        for process in descendants(os.getpid(), "ray::ImplicitFunc"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    yield killed
    killer.join()


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on(data, tmp_path):
    made = plan(
        data,
        tmp_path,
        num_seeds=1,
        config=config(data, schedule={"epochs": 8}, scaling={"max_failures": 3}),
    )

    with killing_the_first_trial(Path(made.folder)) as killed:
        tuning.fit(made, say=lambda line: None)
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
        tuning.fit(made, say=lambda line: None)
    ends = rows(Path(made.folder)).groupby("trial").tail(1)
    assert ends["status"].tolist() == ["failed", "finished"]
    assert "process died" in ends["stop_reason"].iloc[0]


@pytest.mark.slow
def test_a_time_budget_ends_a_sitting_and_the_next_goes_on(data, tmp_path):
    settings = config(data, schedule={"epochs": 40})
    said: list[str] = []
    first = plan(data, tmp_path, num_seeds=1, config=settings, limits={"time_budget_s": 8})
    tuning.fit(first, say=said.append)
    assert any("are not over: the same command goes on" in line for line in said)
    tuning.fit(plan(data, tmp_path, num_seeds=1, config=settings), say=said.append)
    found = rows(Path(first.folder))
    assert found.groupby("trial")["epoch"].apply(list).tolist() == [list(range(1, 41))] * 2


SEARCH = """
method = "search"
space.optimizer.learning_rate = { low = 0.00001, high = 0.2, log = true }
space.transforms.normalization = ["none", "dataset"]
"""


@pytest.mark.slow
def test_a_search_stops_trials_and_goes_on_with_more(data, tmp_path):
    settings = config(data, schedule={"epochs": 9})
    tuning.fit(plan(data, tmp_path, SEARCH, num_trials=8, config=settings), say=lambda line: None)
    folder = tmp_path / "tried"
    found = rows(folder)
    ends = found.groupby("trial").tail(1)
    assert set(ends["status"]) == {"finished", "stopped"}
    stopped = ends[ends["status"] == "stopped"]
    assert (stopped["epoch"] < 9).all() and stopped["stop_reason"].str.startswith("ASHA").all()
    assert (ends[ends["status"] == "finished"]["epoch"] == 9).all()
    summary = tuning.fit(
        plan(data, tmp_path, SEARCH, num_trials=10, config=settings), say=lambda line: None
    )
    more = rows(folder)
    assert more["trial"].nunique() == 10 and not more.duplicated(["trial", "epoch"]).any()
    kept = more[more["trial"] < 8].reset_index(drop=True)
    assert kept.equals(found.reset_index(drop=True))
    assert summary["winner"]["settings"]["schedule.epochs"] == 9


SEARCHING = [*COMMAND[:4], *("--epochs", "9", "--num-trials", "6", "--max-concurrent", "1")]
SEARCHING += [*COMMAND[8:-1], "searched.toml"]


def search_job(data: str, folder: Path) -> subprocess.Popen:
    (folder / "searched.toml").write_text(SEARCH)
    command = [*SEARCHING, "--data", data, "--storage", str(folder / "sweeps")]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
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
    stood = {trial.number: trial for trial in records.read_all(str(broken / "sweeps/searched"))}
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
    said: list[str] = []
    with killing_the_first_trial(Path(made.folder)) as killed:
        tuning.fit(made, say=said.append)
    assert killed
    assert any("1 at once" in line for line in said)
    found = rows(Path(made.folder))
    ends = found.groupby("trial").tail(1)
    assert len(ends) == 3 and set(ends["status"]) == {"finished", "stopped"}
    assert (ends[ends["status"] == "finished"]["epoch"] == 4).all()
    assert (ends[ends["status"] == "stopped"]["epoch"] == 1).all()
    assert not found.duplicated(["trial", "epoch"]).any()
    assert any("paused" in line for line in said)
    wait_for(lambda: not descendants(os.getpid(), "ray::RayTrainWorker"), 30)


def test_what_a_killed_trials_workers_hold_is_given_back(ray_cluster, tmp_path):
    """Whatever Ray Train's own helper does: it fails where two clusters run on a machine."""
    from ray.util import placement_group, placement_group_table

    group = placement_group([{"CPU": 1}])
    assert group.wait(60)
    folder = records.folder_of(str(tmp_path), 7)
    storage.write_json(storage.join(folder, worker.PLACEMENT_GROUP), {"id": group.id.hex()})
    for _ in range(2):  # it may be gone already
        trial.free_workers(str(tmp_path), 7)
    wait_for(lambda: placement_group_table(group)["state"] == "REMOVED", 30)
    trial.free_workers(str(tmp_path), 8)  # it had no workers yet


def test_a_checkpoint_is_kept_whole_and_the_one_before_it_goes(tmp_path):
    folder = str(tmp_path / "trial")
    for place in (folder, f"file://{folder}-uri"):
        for epoch in (1, 2):
            history = [
                {"epoch": number, "learning_rate": 0.1, **dict.fromkeys(records.METRICS, 0.5)}
                for number in range(1, epoch + 1)
            ]

            def write(unfinished: Path) -> None:
                (unfinished / "model.safetensors").write_bytes(b"weights")
                (unfinished / checkpoint.INDEX).write_text("{}")

            records.save(place, epoch, history, write)
        names = storage.list_names(place)
        assert names == ["checkpoint_000002", "history.parquet"]
        assert storage.list_names(storage.join(place, "checkpoint_000002")) == [
            *("checkpoint.json", "model.safetensors")
        ]


def test_what_a_crash_left_between_a_checkpoint_and_its_row_is_made_good(tmp_path, monkeypatch):
    """Where nothing is left to train, nobody else would write the row."""
    row = {**dict.fromkeys(records.METRICS, 0.5), "learning_rate": 0.1, "epoch": 1}
    folder = records.folder_of(str(tmp_path), 3)
    records.create(str(tmp_path), records.Trial(number=3, arm=None, options={}))
    found = [SimpleNamespace(epoch=1, history=[row])]
    monkeypatch.setattr(checkpoint, "in_run", lambda place: found)
    assert records.resume(folder) is found[0]
    assert [one["epoch"] for one in records.read_trial(str(tmp_path), 3).history] == [1]
