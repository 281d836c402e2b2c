"""Sweeps on Ray Tune: what is planned, and what one small grid leaves."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayTaskError
from sweeping import TWO, config, plan, rows

from fer_ray import storage
from fer_ray.data import object_store
from fer_ray.errors import JobFailed, UserError
from fer_ray.runtime import resources
from fer_ray.sweeps import progress, run, store
from fer_ray.sweeps.halving import Halving, Job
from fer_ray.sweeps.losses import GpuFailed, Losses, WorkersLost
from fer_ray.sweeps.plan import Limits, concurrent_trials, plan_sweep, share_images
from fer_ray.sweeps.run import run_sweep
from fer_ray.sweeps.store import SweepFolder, Trial


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_trials": 5}, "has 2 arms x 3 seeds = 6 trials; change it with --seeds"),
        ({"sweep": "search", "num_seeds": 2}, "a search trains each configuration with one seed"),
        ({"run": "a/b"}, "not a plain name"),
        ({"sweep": "space.schedule.global_batch_size = [16, 500]"}, "500 is more than the 320"),
        ({"train_fraction": 0.04}, "16 is more than the 14 images of --train-fraction 0.04"),
        (
            {"limits": {"gpus_per_trial": 0.5}, "config": {"num_workers": 2}},
            "each worker has a GPU",
        ),
        ({"limits": {"gpus_per_trial": 1.5}}, "--gpus-per-trial: 1.5 is not a number above 0, at"),
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
        plan_sweep(
            config(data),
            sweep="normalization",
            storage_path=f"file://{tmp_path}",
            limits=Limits(tensorboard=True),
        )


THREE_CPUS = {"num_workers": 2, "cpus_per_worker": 1.5}


@pytest.mark.parametrize(
    ("scaling", "limits"),
    [({"cpus_per_worker": 3.0}, {}), ({}, {"gpus_per_trial": 0.5}), (THREE_CPUS, {})],
)
def test_what_never_fits_is_refused_before_anything_is_written(data, tmp_path, scaling, limits):
    made = plan(data, tmp_path, config=config(data, scaling=scaling), limits=limits)
    with pytest.raises(UserError, match="requested, the cluster has"):
        run_sweep(made, log=lambda line: None)
    assert not storage.exists(made.folder)


def test_as_many_trials_run_at_a_time_as_fit(data, tmp_path):
    def at_a_time(scaling: dict, **limits) -> int:
        made = plan(data, tmp_path, config=config(data, scaling=scaling), limits=limits)
        return concurrent_trials(made, print)

    assert at_a_time({}) == 2
    assert at_a_time({"cpus_per_worker": 0.5}) == 4
    assert at_a_time({"cpus_per_worker": 0.1}) == 6, "there are no more trials"
    assert at_a_time({"cpus_per_worker": 0.5}, max_concurrent=3) == 3
    assert at_a_time({"num_workers": 2}) == 1


@pytest.mark.parametrize(
    ("grown", "limits", "expected", "num_lines"),
    [
        *((3, {}, 3, 0), (9, {}, 6, 0), (9, {"max_concurrent": 4}, 4, 0)),
        *((None, {}, 2, 1), (None, {"max_concurrent": 5}, 5, 1)),
        (None, {"max_concurrent": 2}, 2, 0),
    ],
)
def test_trials_wait_for_the_nodes_that_a_cluster_may_start(
    data, tmp_path, monkeypatch, grown, limits, expected, num_lines
):
    monkeypatch.setattr(resources, "fitting_at_maximum", lambda each: grown)
    lines: list[str] = []
    assert concurrent_trials(plan(data, tmp_path, limits=limits), lines.append) == expected
    assert sum("--max-concurrent" in line for line in lines) == num_lines


def test_a_fraction_of_the_train_split_is_taken_of_each_class():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 3 + [-1] * 50)
    kept = object_store.stratified(labels, 0.2, seed=1)
    assert np.bincount(labels[kept]).tolist() == [20, 2, 1]
    assert (np.diff(kept) > 0).all()
    assert kept.tolist() == object_store.stratified(labels, 0.2, seed=1).tolist()
    assert kept.tolist() != object_store.stratified(labels, 0.2, seed=2).tolist()
    everything = object_store.stratified(labels, 1.0, seed=1)
    assert everything.tolist() == np.flatnonzero(labels >= 0).tolist()


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 90), min_size=2, max_size=5), fraction=st.floats(0.01, 1))
def test_as_many_images_are_seen_as_the_plan_says(data, counts, fraction):
    if not any(counts):
        return
    labels = np.repeat(np.arange(len(counts)), counts)
    kept = object_store.stratified(labels, fraction, seed=0)
    assert len(kept) == sum(object_store.stratum_size(count, fraction) for count in counts)


def test_a_plan_counts_the_images_that_trials_see(data, tmp_path):
    made = plan(data, tmp_path, train_fraction=0.33)
    classes = made.info.split("train").classes.values()
    assert made.train_images == sum(max(round(0.33 * count), 1) for count in classes)
    with pytest.raises(UserError, match=f"more than the {made.train_images} images"):
        larger = made.train_images // 4 * 4 + 4  # whole groups of batch norm
        batches = f"space.schedule.global_batch_size = [16, {larger}]"
        plan(data, tmp_path, batches, train_fraction=0.33)


def test_images_that_do_not_fit_are_refused_with_the_fraction_that_fits(
    data, tmp_path, monkeypatch
):
    import ray

    made = plan(data, tmp_path)
    rows = {name: made.info.split(name).rows for name in ("train", "validation")}
    each = made.info.image_size**2

    def refused(room: float) -> str:
        node = {"Alive": True, "Resources": {"object_store_memory": 2 * room * each}}
        monkeypatch.setattr(ray, "nodes", lambda: [node])
        with pytest.raises(UserError, match="--train-fraction") as caught:
            share_images(made)
        return str(caught.value)

    half = rows["validation"] + rows["train"] / 2
    assert refused(half).endswith("at most 0.5 fits")
    assert refused(rows["validation"] - 1).endswith("the validation split alone is larger")


HALF = """
space.optimizer.learning_rate = [0.05, 100.0]
space.optimizer.clip_grad_norm = [0.0]
space.optimizer.ema_half_life = [0.0]
"""


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """A grid with an arm whose loss cannot stay finite, and its lines of progress."""
    folder, lines = tmp_path_factory.mktemp("sweeps"), []
    settings = config(data, model={"name": "sequential_cnn"}, schedule={"warmup_epochs": 0})
    made = plan(data, folder, HALF, num_seeds=2, config=settings, limits={"tensorboard": True})
    summary = run_sweep(made, log=lines.append)
    return Path(made.folder), summary, lines, settings


def test_every_trial_and_epoch_is_a_row_and_a_failure_is_recorded(swept, data):
    folder, summary, lines, _ = swept
    assert pq.read_schema(folder / "trials.parquet").equals(store.schema())
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
    assert sum("failed" in line and "not finite" in line for line in lines) == 2
    assert any("2 arms x 2 seeds = 4 trials of 2 epochs" in line for line in lines)
    assert any("2 at a time; 8 epochs to run" in line for line in lines)
    assert (good["computed_in"] == "float32").all() and good["hardware"].nunique() == 1
    assert good["versions"].str.fullmatch(r"torch .+, ray .+").all()
    assert [group["trials"] for group in summary["ran_on"]] == [2]


def test_only_the_sweeps_files_are_left(swept):
    folder, *_ = swept
    names = {path.name for path in folder.iterdir()}
    assert names == {"sweep.json", "summary.json", "trials.parquet", "trials", "tensorboard"}
    for trial in (folder / "trials").iterdir():
        kept = {path.name for path in trial.iterdir()}
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
    monkeypatch.setattr(run, "_run_trials", lambda *arguments: started.append(1))
    again = plan(data, folder.parent, HALF, num_seeds=2, config=settings)
    run_sweep(again, log=lambda line: None)
    assert not started and (folder / "trials.parquet").read_bytes() == before
    lines: list[str] = []
    run_sweep(plan(data, folder.parent, HALF, num_seeds=3, config=settings), log=lines.append)
    assert started == [1]
    assert any("4 epochs to run (4 trials are over" in line for line in lines)
    trials = SweepFolder(str(folder)).trials()
    assert [trial.options["schedule.seed"] for trial in trials] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match=r"seeds: \[0, 1, 2\] -> \[0\], seeds can only be added"):
        plan(data, folder.parent, HALF, num_seeds=1, config=settings)


def test_a_live_table_is_erased_whole_and_never_wraps(swept, data, monkeypatch, capsys):
    folder, *_ = swept
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    files = SweepFolder(str(folder))
    halving = Halving((2,), 9, files.trials())
    shown = progress.Progress(files, config(data), halving, NO_RETRIES, log=lambda line: None)
    shown.on_trial_start(0, [], tuned(0, 2))
    shown._draw()
    drawn = capsys.readouterr().out.splitlines()
    assert len(drawn) == len(shown.table()) == 2
    assert all(0 < len(line) < 40 for line in drawn)
    assert max(map(len, shown.table())) > 40, "nothing had to be cut"
    shown.close()
    assert capsys.readouterr().out == "\x1b[2F\x1b[J"


NO_RETRIES = Losses(0, lambda avoided: True)


def tuned(number: int, until: int) -> SimpleNamespace:
    """A trial of Ray Tune."""
    return SimpleNamespace(config={"number": number, "until": until})


def test_the_table_tells_what_is_paused_and_what_was_promoted(tmp_path):
    files, lines = SweepFolder(str(tmp_path)), []
    row = {**dict.fromkeys(store.METRICS, 0.5), "learning_rate": 0.1, "images_per_s": 900.0}
    for number in range(4):
        files.create(Trial(number=number, arm=None, options={"schedule.seed": 0}))
    history = [{**row, "epoch": epoch} for epoch in (1, 2)]
    for number in range(3):
        files.trial(number).save(history[:1], lambda path: None)
    halving = Halving((1, 3, 9), 9, files.trials())
    shown = progress.Progress(files, small.config(), halving, NO_RETRIES, log=lines.append)
    for number, until in ((0, 3), (3, 1)):
        assert halving.next() == Job(number=number, until=until)
        shown.on_trial_start(0, [], tuned(number, until))
    shown.on_trial_result(0, [], tuned(0, 3), history[1])
    first, second, last = shown.table()
    assert first == "  trial 0, promoted: epoch 2/3 of 9, 50.00%, 900 images/s"
    assert second == "  trial 3: epoch 0/1 of 9"
    # 1 of trial 0, 1 of trial 3, 5 new trials, 2 more to epoch 3, 1 to the end
    assert last.startswith("  0 of 9 trials over, 2 paused; 17 epochs to run, about ")
    files.trial(3).save(history[:1], lambda path: None)
    shown.on_trial_complete(0, [], tuned(3, 1))
    assert lines[0] == "trial 3 paused: 50.00% after 1 epoch, 0 s"
    lines.clear()
    shown.on_trial_complete(0, [], tuned(1, 3))  # the time budget ended before it began
    shown.on_trial_complete(0, [], tuned(0, 3))
    assert not lines


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RayActorError(error_msg="The actor died.\nMore."), "its process died: The actor died."),
        (RayTaskError("train", "trace", WorkersLost("its workers failed")), "its workers failed"),
        (None, "it ended for an unknown reason"),
    ],
)
def test_the_reason_of_a_trial_that_was_lost_too_often(tmp_path, error, reason):
    files, lines, shown, failed = lost_trial(tmp_path, error, NO_RETRIES)
    shown.on_trial_error(0, [], failed)
    assert (files.trial(0).read().status, files.trial(0).read().reason) == (store.FAILED, reason)
    assert lines[0] == f"trial 0 failed ({reason})"
    assert shown._halving.trials[0].status == store.FAILED


def lost_trial(tmp_path: Path, error: Exception | None, losses: Losses):
    """A sweep with one trial whose process ended by an error: files, lines, progress, the trial."""
    files = SweepFolder(str(tmp_path))
    files.create(Trial(number=0, arm=None, options={"schedule.seed": 0}))
    lines: list[str] = []
    halving = Halving((1,), 1, [])
    shown = progress.Progress(files, small.config(), halving, losses, log=lines.append)
    file = tmp_path / "error.pkl"
    if error:
        file.write_bytes(pickle.dumps(error))
    failed = SimpleNamespace(**vars(tuned(0, 1)), pickled_error_file=str(file))
    assert halving.next() == Job(number=0, until=1)
    shown.on_trial_start(0, [], failed)
    return files, lines, shown, failed


def test_a_trial_that_was_lost_with_its_gpu_is_the_next_job(tmp_path):
    error = RayTaskError("train", "trace", GpuFailed("the GPU of node 10.0.0.2 failed: x", "a"))
    files, lines, shown, failed = lost_trial(tmp_path, error, NO_RETRIES)
    shown.on_trial_error(0, [], failed)
    assert lines == ["trial 0 was interrupted: the GPU of node 10.0.0.2 failed: x"]
    assert not files.trial(0).read().is_over
    assert shown._halving.next() == Job(number=0, until=1)


def test_the_workers_of_a_lost_trial_are_freed_until_it_starts_again(tmp_path, monkeypatch):
    """The next job may be another trial, which would wait for their CPUs for ever."""
    freed: list[int] = []
    monkeypatch.setattr(progress, "free_workers", lambda folder: freed.append(folder.number))
    monkeypatch.setattr(progress.Progress, "_draw", lambda self: None)
    error = RayActorError(error_msg="it died")
    _, _, shown, failed = lost_trial(tmp_path, error, Losses(1, lambda avoided: True))
    shown._base = small.config(scaling={"num_workers": 2})
    shown.on_trial_error(0, [], failed)
    shown.on_step_end(0, [])
    assert freed == [0]
    shown.on_trial_start(0, [], failed)
    shown._freed_at = 0.0
    shown.on_step_end(1, [])
    assert freed == [0], "these are its new workers"


def test_a_sweep_whose_trials_all_failed_has_failed(data, tmp_path, monkeypatch):
    made = plan(data, tmp_path, num_seeds=1)

    def fail(plan: object, halving: Halving, *arguments: object) -> None:
        while job := halving.next():
            made.files.trial(job.number).end(store.FAILED, f"reason {job.number}")
            halving.ended(made.files.trial(job.number).read())

    monkeypatch.setattr(run, "_run_trials", fail)
    for _ in range(2):  # by the same command again, which trains nothing
        with pytest.raises(JobFailed, match="all 2 trials failed, the last one: reason 1; see "):
            run_sweep(made, log=lambda line: None)
    assert set(rows(Path(made.folder))["status"]) == {"failed"}


def test_another_sweep_under_the_same_name_is_refused_and_shown(swept, data):
    folder, _, _, settings = swept
    longer = config(
        data,
        model={"name": "sequential_cnn"},
        schedule={"warmup_epochs": 0, "epochs": 3},
    )
    with pytest.raises(UserError, match=r"schedule\.epochs: 2 -> 3"):
        plan(data, folder.parent, HALF, num_seeds=3, config=longer)
    with pytest.raises(UserError, match="arms has changed"):
        plan(data, folder.parent, TWO, num_seeds=3, config=settings)
    with pytest.raises(UserError, match="train_fraction has changed"):
        plan(data, folder.parent, HALF, num_seeds=3, config=settings, train_fraction=0.5)


def test_seeds_are_called_added_only_where_there_was_a_result(data, tmp_path):
    def added(seeds: int) -> list[int]:
        made = plan(data, tmp_path, num_seeds=seeds)
        run._write_settings(made)
        return made.files.read_settings()["fewer_seeds_before"]

    assert added(1) == added(2) == []
    made = plan(data, tmp_path, num_seeds=2)
    made.files.create(Trial(number=0, arm="one", options={}))
    made.files.trial(0).end(store.FINISHED)
    assert (added(3), added(3), added(4)) == ([2], [2], [2, 3])


def test_the_largest_network_of_a_search_has_all_that_makes_it_large(data, tmp_path):
    text = """
    method = "search"
    space.model.width = { low = 4, high = 8 }
    space.model.depth = [1, 2]
    """
    made = plan(data, tmp_path, text).to_dict()
    alone = [
        plan(data, tmp_path, config=config(data, model=model), run="other").to_dict()["parameters"]
        for model in ({"width": 8}, {"depth": 2}, {"width": 8, "depth": 2})
    ]
    assert made["most_parameters"] == max(alone) == alone[-1]
