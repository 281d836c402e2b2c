import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import rewriting
import safetensors.torch
import small
import torch

from fer_ray.data.integrity import FileRecord
from fer_ray.errors import UserError
from fer_ray.models import checkpoint, run_checkpoints
from fer_ray.training import loop
from fer_ray.training.process_group import ProcessGroup


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the checkpoints of three epochs, and the trainer that wrote them."""
    folder = tmp_path_factory.mktemp("run")
    config = small.config(schedule={"epochs": 3}, optimizer={"optimizer": "adamw"})
    described = small.info(48)
    trainer = loop.Trainer(
        config,
        described,
        small.feed(config, small.split(48), small.split(20, seed=1), described=described),
        group=ProcessGroup(),
        labels={"run": "tried", "environment": {}},
        resume=None,
    )

    def report(history, snapshot):
        path = folder / f"checkpoint_{len(history)}"
        path.mkdir()
        snapshot()(path)

    trainer.fit(report)
    return folder, trainer


def test_no_file_is_a_pickle(saved):
    folder, _ = saved
    files = {file.name for file in (folder / "checkpoint_1").iterdir()}
    assert files == {"checkpoint.json", "model.safetensors", "training.safetensors"}


def test_a_loaded_model_predicts_what_the_trained_one_did_bit_for_bit(saved):
    folder, trainer = saved
    images = torch.from_numpy(small.split(9, seed=5).images)
    expected = trainer.forward.probabilities(trainer.average.model, images)
    read = checkpoint.read(str(folder / "checkpoint_3"))
    model = read.load_model(torch.device("cpu"))
    forward = read.forward(torch.device("cpu"))
    assert forward == trainer.forward
    assert torch.equal(forward.probabilities(model, images), expected)


def test_the_normalization_travels_exactly(saved):
    folder, trainer = saved
    normalizer = checkpoint.read(str(folder / "checkpoint_2")).normalizer
    assert normalizer == trainer.forward.normalizer
    images = torch.randint(0, 256, (4, 12, 12), dtype=torch.uint8)
    assert torch.equal(normalizer(images), trainer.forward.normalizer(images))


def test_a_run_stands_for_its_best_checkpoint_and_of_equals_the_latest(saved, tmp_path):
    folder, _ = saved
    found = run_checkpoints.find(str(folder))
    kept = run_checkpoints.in_run(str(folder))
    assert sorted(one.epoch for one in kept) == [1, 2, 3]
    best = max(one.score for one in kept)
    assert found.score == best
    assert found.epoch == max(one.epoch for one in kept if one.score == best)


@pytest.fixture
def two(saved, tmp_path):
    """A run with a best checkpoint, ``checkpoint_b``, and one that is as good, ``checkpoint_a``."""
    folder, _ = saved
    best = run_checkpoints.find(str(folder))
    for name in ("checkpoint_a", "checkpoint_b"):
        shutil.copytree(best.path, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
def test_a_damaged_best_checkpoint_is_replaced_only_on_request_and_said_so(two, name):
    """A crash may cut an upload short; the resumed run writes the same epoch again."""
    file = two / "checkpoint_b" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{file} is damaged: .*checkpoint_a.*--allow-fallback$"):
        run_checkpoints.find(str(two))
    lines: list[str] = []
    kept = run_checkpoints.find(str(two), allow_fallback=True, log=lines.append)
    assert kept.path.endswith("checkpoint_a")
    (line,) = lines
    assert line.startswith(f"warning: {file} is damaged") and line.endswith(
        "using checkpoint_a instead"
    )
    shutil.rmtree(two / "checkpoint_a")
    with pytest.raises(UserError, match=f"no checkpoint can be used: {file} is damaged"):
        run_checkpoints.find(str(two), allow_fallback=True)


def test_a_result_tells_which_checkpoint_is_the_best(two):
    best = run_checkpoints.find(str(two))
    assert best.path.endswith("checkpoint_b")
    result = {"best_checkpoint": "checkpoint_b", "checkpoint_sha256": best.sha256}
    (two / "run.json").write_text(json.dumps(result))
    (two / "checkpoint_a" / "checkpoint.json").write_text("{")
    assert run_checkpoints.find(str(two)).path == best.path, "another one is damaged"
    shutil.rmtree(two / "checkpoint_a")
    for changes in ({"best_checkpoint": "checkpoint_a"}, {"checkpoint_sha256": "0" * 64}):
        (two / "run.json").write_text(json.dumps(result | changes))
        with pytest.raises(UserError, match="not the one that its result records"):
            run_checkpoints.find(str(two))
    (two / "run.json").write_text(json.dumps(result | {"best_checkpoint": "../victim"}))
    with pytest.raises(UserError, match=r"best_checkpoint is '\.\./victim', not a plain name"):
        run_checkpoints.find(str(two))
    assert (
        run_checkpoints.find(str(two), allow_fallback=True, log=lambda line: None).path == best.path
    )


@pytest.mark.parametrize("damaged", ["model.safetensors", "training.safetensors"])
def test_a_run_goes_on_from_its_latest_checkpoint_that_is_undamaged(saved, tmp_path, damaged):
    """Ray Train copies the files one by one: a crash leaves any of them short."""
    folder, _ = saved
    assert run_checkpoints.latest(str(tmp_path)) is None
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert run_checkpoints.latest(str(tmp_path)).epoch == 3
    file = tmp_path / "checkpoint_3" / damaged
    file.write_bytes(file.read_bytes()[:-100])
    lines: list[str] = []
    assert run_checkpoints.latest(str(tmp_path), log=lines.append).epoch == 2
    assert len(lines) == 1 and f"passing over a checkpoint: {file} is damaged" in lines[0]
    (tmp_path / "checkpoint_2" / "checkpoint.json").unlink()
    assert run_checkpoints.latest(str(tmp_path)).epoch == 1


def test_restoring_gives_the_optimizer_back(saved):
    folder, trainer = saved
    other = loop.Trainer(
        trainer.config,
        trainer.info,
        trainer.feed,
        group=ProcessGroup(),
        labels={"run": "tried", "environment": {}},
        resume=checkpoint.read(str(folder / "checkpoint_3")),
    )
    assert isinstance(other.optimizer, torch.optim.AdamW)
    ours, theirs = trainer.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for index, state in ours.items():
        for name, value in state.items():
            assert torch.equal(value, theirs[index][name])


def test_the_hash_tells_what_predicts_and_not_how_it_was_trained(saved):
    folder, _ = saved
    hashes = {checkpoint.read(str(folder / f"checkpoint_{n}")).sha256 for n in (1, 2, 3)}
    assert len(hashes) == 3
    path = folder / "checkpoint_1" / "checkpoint.json"
    before, text = checkpoint.read(str(path.parent)).sha256, path.read_text()
    value = json.loads(text)
    try:
        rewriting.hash_again(path, environment={"other": 1})
        assert checkpoint.read(str(path.parent)).sha256 == before
        value["normalizer"]["mean"] += 0.01
        rewriting.hash_again(path, normalizer=value["normalizer"])
        assert checkpoint.read(str(path.parent)).sha256 != before
    finally:
        path.write_text(text)


def test_what_is_not_whole_is_refused_and_passed_over(saved, tmp_path):
    folder, _ = saved
    copy = tmp_path / "checkpoint_1"
    copy.mkdir()
    for file in (folder / "checkpoint_1").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.safetensors").write_bytes(b"x" + (copy / "model.safetensors").read_bytes()[1:])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(str(copy)).load_model(torch.device("cpu"))
    (copy / "training.safetensors").unlink()
    with pytest.raises(UserError, match=r"training\.safetensors is missing"):
        checkpoint.read(str(copy))
    assert run_checkpoints.in_run(str(tmp_path)) == []
    with pytest.raises(UserError, match="no checkpoint"):
        run_checkpoints.find(str(tmp_path))
    for content in (b"{", b"\xff\xfe", b"[]"):
        (copy / "checkpoint.json").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(str(copy))
    with pytest.raises(UserError, match="the folder does not exist"):
        run_checkpoints.find(str(copy / "checkpoint.json"))


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint's folder of its own."""
    return shutil.copytree(saved[0] / "checkpoint_1", tmp_path / "run" / "checkpoint_1")


NAN = float("nan")

CHANGES = [
    {"labels": ["happy", "angry", "sad"]},
    {"image_size": 13},
    {"normalizer": {"normalization": "dataset", "mean": 0.9, "std": 0.25}},
    {"epoch": 99},
    {"flip_at_test": False},
    {"run": "another"},
    {"history": []},
    {"environment": {"hardware": "another"}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_a_changed_value_of_the_index_is_refused(copy, changes):
    index = copy / "checkpoint.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(UserError, match=f"^{index} is damaged: .*not the hash of its content$"):
        checkpoint.read(str(copy))


def test_every_flipped_bit_of_the_index_is_refused(copy):
    index = copy / "checkpoint.json"
    content = index.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        index.write_bytes(flipped)
        if flipped != content and not _same_json(flipped, content):
            with pytest.raises(UserError) as caught:
                checkpoint.read(str(copy))
            assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def _same_json(content: bytes, other: bytes) -> bool:
    """Whether only white space differs."""
    try:
        return json.loads(content) == json.loads(other)
    except ValueError:
        return False


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(copy):
    index = copy / "checkpoint.json"
    value = json.loads(index.read_text())
    del value["content_sha256"]
    index.write_text(json.dumps(value | {"format": 1}))
    message = f"^{copy}: this checkpoint has format 1, this version of fer_ray reads format 2"
    with pytest.raises(UserError, match=message):
        checkpoint.read(str(copy))
    # the format is part of what is hashed
    index.write_text(json.dumps(value | {"format": 2}))
    with pytest.raises(UserError, match="content_sha256 is missing"):
        checkpoint.read(str(copy))


MALFORMED = [
    ({"labels": [1, 2]}, r"labels is \[1, 2\], not a list of different texts"),
    ({"labels": ["a", "a"]}, "labels is"),
    ({"image_size": "48"}, "image_size is '48', not a whole number between 8 and 1024"),
    ({"image_size": True}, "image_size is True"),
    ({"image_size": 10**9}, "image_size is 1000000000"),
    ({"epoch": 99}, "epoch is 99"),
    ({"history": [{}]}, "a row of history has no validation_accuracy"),
    ({"history": "none"}, "history is 'none', not a list"),
    ({"flip_at_test": 1}, "flip_at_test is 1, not true or false"),
    ({"precision": "float99"}, "precision is .float99., not an arithmetic"),
    ({"model": {"name": ["custom_cnn"]}}, "model.name is"),
    ({"model": {"name": "custom_cnn", "width": "wide"}}, "--width: 'wide' is not from 1 to 512"),
    ({"model": {"name": "no_such"}}, "'no_such' is not one of"),
    ({"model": {"name": "custom_cnn", "setting": ["small"]}}, "unhashable"),
    ({"normalizer": {"normalization": "none", "mean": "0", "std": 1}}, "normalizer.mean is '0'"),
    ({"files": {"../victim": {"num_bytes": 1, "sha256": "0" * 64}}}, "files are not"),
    ({"files": {"model.safetensors": {"num_bytes": -1, "sha256": "0" * 64}}}, "num_bytes is -1"),
    ({"config": []}, r"config is \[\], not an object"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_a_malformed_index_is_one_line_that_names_it(copy, changes, message):
    rewriting.hash_again(copy / "checkpoint.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(str(copy))
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
    shutil.copytree(copy, copy.parent / "checkpoint_2")
    rewriting.hash_again(copy / "checkpoint.json")
    assert run_checkpoints.in_run(str(copy.parent)) == []


@pytest.mark.parametrize(
    "content", rewriting.NO_JSON_OBJECTS.values(), ids=rewriting.NO_JSON_OBJECTS
)
def test_an_index_that_is_no_json_object_does_not_block_other_checkpoints(saved, copy, content):
    shutil.copytree(saved[0] / "checkpoint_2", copy.parent / "checkpoint_2")
    index = copy / "checkpoint.json"
    index.write_bytes(content)
    with pytest.raises(UserError, match=f"{index} is damaged") as caught:
        checkpoint.read(str(copy))
    assert "\n" not in str(caught.value)
    assert [kept.epoch for kept in run_checkpoints.in_run(str(copy.parent))] == [2]
    assert run_checkpoints.latest(str(copy.parent)).epoch == 2


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_blocks_nobody(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=f"{copy / name} is a pipe or a device, not a file"):
        checkpoint.read(str(copy)).load_model(torch.device("cpu"))
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{copy / name} is a pipe or a device, not a file"):
        checkpoint.read(str(copy)).load_model(torch.device("cpu"))


def replace_weights(copy: Path, content: bytes) -> None:
    """Puts another file in the place of the weights, with its hash in the index."""
    (copy / "model.safetensors").write_bytes(content)
    files = json.loads((copy / "checkpoint.json").read_text())["files"]
    files["model.safetensors"] = FileRecord.of(content).to_dict()
    rewriting.hash_again(copy / "checkpoint.json", files=files)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copy, value):
    weights = checkpoint.read(str(copy)).load_tensors("model.safetensors")
    weights["classifier.weight"][0, 0] = value
    replace_weights(copy, safetensors.torch.save(weights))
    with pytest.raises(UserError, match=r"'classifier\.weight' has values that are infinite or no"):
        run_checkpoints.find(str(copy))


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file that is only a header."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 2**62),
        header(b" " * 2**20 + b"{}"),
        header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        header(b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    ],
    ids=["empty", "huge header", "blank header", "deep header", "huge tensor", "another network"],
)
def test_weights_of_a_malformed_file_are_one_line_that_names_it(copy, content):
    replace_weights(copy, content)
    with pytest.raises(UserError, match=r"model\.safetensors does not") as caught:
        checkpoint.read(str(copy)).load_model(torch.device("cpu"))
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_much_larger_than_its_weights_is_not_built(copy):
    model = {"name": "custom_cnn", "width": 512, "depth": 16}  # 6 billion parameters
    rewriting.hash_again(copy / "checkpoint.json", model=model)
    start = time.monotonic()
    with pytest.raises(UserError, match="the network has more than"):
        checkpoint.read(str(copy)).load_model(torch.device("cpu"))
    assert time.monotonic() - start < 20


def test_a_run_does_not_resume_from_other_settings(saved, copy):
    config = saved[1].config
    checkpoint.read(str(copy)).check_config(config)
    more = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, num_workers=2))
    checkpoint.read(str(copy)).check_config(more)
    other = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, seed=7))
    with pytest.raises(checkpoint.OtherSettings, match=r"schedule\.seed: 0 -> 7"):
        checkpoint.read(str(copy)).check_config(other)
    rewriting.hash_again(copy / "checkpoint.json", config={"model": [1]})
    with pytest.raises(checkpoint.OtherSettings, match="model is not a section"):
        checkpoint.read(str(copy)).check_config(config)
