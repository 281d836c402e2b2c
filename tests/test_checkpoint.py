import json
import shutil

import pytest
import small
import torch

from fer_ray.errors import UserError
from fer_ray.models import checkpoint
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

    def report(history, save):
        path = folder / f"checkpoint_{len(history)}"
        path.mkdir()
        save(path)

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
    found = checkpoint.find(str(folder))
    kept = checkpoint.in_run(str(folder))
    assert sorted(one.epoch for one in kept) == [1, 2, 3]
    best = max(one.score for one in kept)
    assert found.score == best
    assert found.epoch == max(one.epoch for one in kept if one.score == best)


def test_a_half_copied_best_checkpoint_is_passed_over(saved, tmp_path):
    """A crash may cut an upload short; the resumed run writes the same epoch again."""
    folder, _ = saved
    best = checkpoint.find(str(folder))
    for name in ("checkpoint_a", "checkpoint_b"):
        shutil.copytree(best.path, tmp_path / name)
    weights = tmp_path / "checkpoint_b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert checkpoint.find(str(tmp_path)).path.endswith("checkpoint_a")
    shutil.rmtree(tmp_path / "checkpoint_a")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(str(tmp_path))


@pytest.mark.parametrize("damaged", ["model.safetensors", "training.safetensors"])
def test_a_run_goes_on_from_its_latest_checkpoint_that_is_undamaged(saved, tmp_path, damaged):
    """Ray Train copies the files one by one: a crash leaves any of them short."""
    folder, _ = saved
    assert checkpoint.latest(str(tmp_path)) is None
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert checkpoint.latest(str(tmp_path)).epoch == 3
    file = tmp_path / "checkpoint_3" / damaged
    file.write_bytes(file.read_bytes()[:-100])
    assert checkpoint.latest(str(tmp_path)).epoch == 2
    (tmp_path / "checkpoint_2" / "checkpoint.json").unlink()
    assert checkpoint.latest(str(tmp_path)).epoch == 1


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
        path.write_text(json.dumps({**value, "environment": {"other": 1}}))
        assert checkpoint.read(str(path.parent)).sha256 == before
        value["normalizer"]["mean"] += 0.01
        path.write_text(json.dumps(value))
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
    assert checkpoint.in_run(str(tmp_path)) == []
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(str(tmp_path))
    for content in (b"{", b"\xff\xfe", b"[]"):
        (copy / "checkpoint.json").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(str(copy))
    with pytest.raises(UserError, match="the folder does not exist"):
        checkpoint.find(str(copy / "checkpoint.json"))
