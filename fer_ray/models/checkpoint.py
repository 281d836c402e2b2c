"""A checkpoint: a folder with all that inference and a resumed run need, without pickle.

``model.safetensors`` holds the averaged weights, which are evaluated; ``training.safetensors`` the
weights that train and the optimizer's tensors; ``checkpoint.json`` the rest, and the hashes of the
two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fer_ray import storage
from fer_ray.config.model import ModelConfig, model_config
from fer_ray.data.run_folder import CHECKPOINT_INDEX, RunFolder
from fer_ray.errors import UserError
from fer_ray.models import precision, registry
from fer_ray.models.forward import Forward
from fer_ray.transforms.normalization import Normalizer

FORMAT = 1
SCORE = "validation_accuracy"
"""The metric whose highest value makes the best checkpoint."""

INDEX = CHECKPOINT_INDEX
MODEL = "model.safetensors"
_TRAINING = "training.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of ``checkpoint.json``."""

    path: str
    """The folder: local path or URI."""
    run: str
    """Name of the run that wrote it."""
    environment: dict[str, Any]
    """Hardware and versions under which it was trained."""
    model: ModelConfig
    """The network."""
    labels: tuple[str, ...]
    """The classes, in the order of the logits."""
    image_size: int
    """Pixels a side of the images it was trained on."""
    normalizer: Normalizer
    """The normalization of training, with its statistics."""
    flip_at_test: bool
    """Whether its probabilities average each image and its mirror image."""
    precision: str
    """In which arithmetic it was trained and validated, one of `precision.ORDER`."""
    epoch: int
    """Number of finished epochs."""
    history: list[dict[str, Any]]
    """One dict for each epoch: the rows of ``history.parquet``."""
    config: dict[str, Any]
    """The whole configuration of the run."""
    files: dict[str, str]
    """SHA-256 of each tensor file."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The last epoch's row of the history."""
        return self.history[-1]

    @property
    def score(self) -> float:
        """The value whose maximum makes a checkpoint the best one."""
        return float(self.metrics[SCORE])

    @property
    def sha256(self) -> str:
        """Identifies what the checkpoint predicts: a hash of its weights, model and transforms."""
        rest = [self.model.to_dict(), self.labels, self.image_size, asdict(self.normalizer)]
        text = json.dumps([self.files[MODEL], *rest, self.flip_at_test, self.precision])
        return hashlib.sha256(text.encode()).hexdigest()

    def forward(self, device: torch.device) -> Forward:
        """How a batch of images goes through its network on a device.

        On GPUs, this also allows or forbids TensorFloat-32 in the whole process.
        """
        arithmetic = precision.for_inference(self.precision, self.model, device)
        precision.set_tf32(arithmetic)
        return Forward(
            normalizer=self.normalizer,
            input_size=self.model.input_size or self.image_size,
            precision=arithmetic,
            flip_at_test=self.flip_at_test,
        )

    def load_model(self, device: torch.device) -> nn.Module:
        """The network with the evaluated weights, in evaluation mode.

        Raises:
            UserError: where the file of the weights does not have the recorded hash.
        """
        config = self.model.with_fresh_weights()
        network = registry.build(config, num_classes=len(self.labels), image_size=self.image_size)
        network.load_state_dict(self.load_tensors(MODEL))
        return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A tensor file's content, checked against its hash."""
        content = storage.read_bytes(storage.join(self.path, name))
        if hashlib.sha256(content).hexdigest() != self.files[name]:
            raise UserError(f"{self.path}: {name} is damaged: its hash is not the recorded one")
        return safetensors.torch.load(content)

    def restore(self, model: nn.Module, average: nn.Module, optimizer: Any) -> None:
        """Restores the tensors of a training run as they were after `epoch`."""
        tensors = self.load_tensors(_TRAINING)
        own = {key: value for key, value in tensors.items() if key.startswith("model.")}
        model.load_state_dict({key.removeprefix("model."): own[key] for key in own})
        average.load_state_dict(self.load_tensors(MODEL))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key in tensors.keys() - own.keys():
            _, index, name = key.split(".", 2)
            value, parameter = tensors[key], parameters[int(index)]
            if value.shape == parameter.shape:
                # fused optimizers go through the memory of parameter and state side by side
                value = torch.empty_like(parameter, device="cpu").copy_(value)
            state.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(
    folder: Path, *, values: Mapping[str, Any], model: nn.Module, average: nn.Module, optimizer: Any
) -> None:
    """Writes a checkpoint into an existing local folder.

    Args:
        folder: the checkpoint's folder.
        values: the fields of `Checkpoint` but for `place` and `files`.
        model: the network that trains.
        average: the network that is evaluated.
        optimizer: its state may only hold tensors.
    """
    training = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert isinstance(value, torch.Tensor), f"optimizer state {name!r} is not a tensor"
            training[f"optimizer.{index}.{name}"] = value
    files = {}
    for name, tensors in ((MODEL, average.state_dict()), (_TRAINING, training)):
        content = safetensors.torch.save(_on_cpu(tensors))
        (folder / name).write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()
    index = {"format": FORMAT, **_plain(values), "files": files}
    storage.write_json(str(folder / INDEX), index)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in the CPU's memory, in one transfer for each dtype.

    EfficientNet-B2 has about two thousand tensors with its average and its optimizer's state: one
    by one, each copy would wait for the GPU.
    """
    copies: dict[str, torch.Tensor] = {}
    for dtype in {value.dtype for value in tensors.values()}:
        same = {key: value.detach() for key, value in tensors.items() if value.dtype == dtype}
        flat = torch.cat([value.contiguous().flatten() for value in same.values()]).cpu()
        parts = flat.split([value.numel() for value in same.values()])
        copies |= {key: part.view(same[key].shape) for key, part in zip(same, parts)}
    return {key: copies[key] for key in tensors}


def read(path: str) -> Checkpoint:
    """Reads a checkpoint folder.

    Raises:
        UserError: where it is not a checkpoint, or a file is missing.
    """
    try:
        value = storage.read_json(storage.join(path, INDEX))
        if value.pop("format") != FORMAT:
            raise UserError(f"{path}: this checkpoint was written by another version of fer_ray")
        for name in value["files"]:
            if not storage.exists(storage.join(path, name)):
                raise UserError(f"{path}: the checkpoint is incomplete: {name} is missing")
        value["model"] = model_config(**value["model"])
        value["normalizer"] = Normalizer(**value["normalizer"])
        value["labels"] = tuple(value["labels"])
        return Checkpoint(path=path, **value)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a checkpoint: {INDEX} is missing") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, not UTF-8
        raise UserError(f"{path}: {INDEX} is damaged: {error}") from error


def find(path: str) -> Checkpoint:
    """The checkpoint of a path: the folder itself, or the best one of a run's folder.

    Of equally good ones it is the latest. One whose weights are damaged is passed over.

    Raises:
        UserError: where there is no undamaged checkpoint.
    """
    path = storage.absolute(path)
    if not storage.is_directory(path):
        raise UserError(f"{path}: no checkpoint: the folder does not exist")
    if storage.exists(storage.join(path, INDEX)):
        return read(path)
    checkpoints = in_run(path)
    ranked = sorted(checkpoints, key=lambda kept: (kept.score, kept.epoch, kept.path), reverse=True)
    if best := _first_undamaged(ranked, MODEL):
        return best
    raise UserError(f"{path}: no checkpoint: give the folder of a checkpoint or of a run")


def latest(path: str) -> Checkpoint | None:
    """The latest undamaged checkpoint of a run, from which it resumes; None where there is none."""
    ranked = sorted(in_run(path), key=lambda kept: (kept.epoch, kept.path), reverse=True)
    return _first_undamaged(ranked, MODEL, _TRAINING)


def _first_undamaged(candidates: Sequence[Checkpoint], *names: str) -> Checkpoint | None:
    for candidate in candidates:
        # another process may remove it meanwhile
        with contextlib.suppress(UserError, FileNotFoundError):
            for name in names:
                candidate.load_tensors(name)
            return candidate
    return None


def in_run(path: str) -> list[Checkpoint]:
    """The checkpoints of a run's folder; incomplete ones are passed over."""
    checkpoints = []
    for folder in RunFolder(path).checkpoint_paths():
        with contextlib.suppress(UserError):
            checkpoints.append(read(folder))
    return checkpoints


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses as dicts, so that JSON takes them."""
    model, normalizer = values["model"].to_dict(), asdict(values["normalizer"])
    return {**values, "model": model, "normalizer": normalizer}
