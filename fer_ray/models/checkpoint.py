"""A checkpoint: a folder with all that inference and a resumed run need, without pickle.

``model.safetensors`` holds the averaged weights, which are evaluated; ``training.safetensors`` the
weights that train and the optimizer's tensors; ``checkpoint.json`` the rest, the hashes of the two,
and the hash of its own content, which therefore stands for the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fer_ray import storage
from fer_ray.config.model import ModelConfig, model_config
from fer_ray.config.schema import TrainConfig, differences
from fer_ray.data.dataset import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from fer_ray.data.integrity import FileRecord, check_hash, read_file, with_hash
from fer_ray.data.json_values import Record, is_finite
from fer_ray.data.run_folder import CHECKPOINT_INDEX
from fer_ray.errors import UserError, first_line
from fer_ray.models import precision, registry, tensor_files
from fer_ray.models.forward import Forward
from fer_ray.transforms.normalization import Normalizer

FORMAT = 2
"""``format`` in ``checkpoint.json``. Format 1 had no hash of its own content."""
SCORE = "validation_accuracy"
"""The metric whose highest value makes the best checkpoint."""

INDEX = CHECKPOINT_INDEX
MODEL = "model.safetensors"
TRAINING = "training.safetensors"

_SPARE_PARAMETERS = 2**26
"""Numbers that building a network may take beyond those of its checkpoint: layers it replaces."""


class OtherSettings(UserError):
    """A checkpoint was trained with other settings than the run that would resume from it."""


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
    compiled: bool
    """Whether the network was compiled for training."""
    epoch: int
    """Number of finished epochs."""
    history: list[dict[str, Any]]
    """One dict for each epoch: the rows of ``history.parquet``."""
    config: dict[str, Any]
    """The whole configuration of the run."""
    files: dict[str, FileRecord]
    """Size and hash of each tensor file."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The last epoch's row of the history."""
        return self.history[-1]

    @property
    def score(self) -> float:
        """The value whose maximum makes a checkpoint the best one."""
        return float(self.metrics[SCORE]) if self.history else -math.inf

    @property
    def computed_in(self) -> str:
        """How training computed: its arithmetic, and whether the network was compiled."""
        return f"{self.precision}, compiled" if self.compiled else self.precision

    @property
    def sha256(self) -> str:
        """Identifies what the checkpoint predicts: a hash of its weights, model and transforms."""
        rest = [self.model.to_dict(), self.labels, self.image_size, asdict(self.normalizer)]
        text = json.dumps([self.files[MODEL].sha256, *rest, self.flip_at_test, self.precision])
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
            UserError: where the file of the weights does not have the recorded hash, or does not
                hold finite weights of this network.
        """
        tensors = self.load_tensors(MODEL)
        config = self.model.with_fresh_weights()
        limit = sum(tensor.numel() for tensor in tensors.values()) + _SPARE_PARAMETERS
        try:
            with registry.at_most_parameters(limit):
                network = registry.build(
                    config, num_classes=len(self.labels), image_size=self.image_size
                )
            network.load_state_dict(tensors)
        except (RuntimeError, UserError) as error:
            raise self._does_not_fit(MODEL, error) from error
        return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A tensor file's content, checked against its hash; all numbers are finite.

        Raises:
            UserError: for a file that is missing or damaged, or numbers that are not finite.
        """
        path = storage.join(self.path, name)
        try:
            content = read_file(path, self.files[name], advice="")
        except FileNotFoundError as error:
            raise _incomplete(self.path, name) from error
        return tensor_files.parse(content, path)

    def restore(self, model: nn.Module, average: nn.Module, optimizer: Any) -> None:
        """Restores the tensors of a training run as they were after `epoch`.

        Raises:
            UserError: where they are damaged, or those of another network or optimizer.
        """
        tensors = self.load_tensors(TRAINING)
        weights = self.load_tensors(MODEL)
        own = {key: value for key, value in tensors.items() if key.startswith("model.")}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        try:
            model.load_state_dict({key.removeprefix("model."): own[key] for key in own})
            average.load_state_dict(weights)
            for key in tensors.keys() - own.keys():
                _, index, name = key.split(".", 2)
                value, parameter = tensors[key], parameters[int(index)]
                if value.shape == parameter.shape:
                    # fused optimizers go through the memory of parameter and state side by side
                    value = torch.empty_like(parameter, device="cpu").copy_(value)
                state.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (RuntimeError, ValueError, LookupError) as error:
            raise self._does_not_fit(TRAINING, error) from error

    def _does_not_fit(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{self.path}: {name} does not fit the network of {INDEX}: {first_line(error)}"
        )

    def check_config(self, config: TrainConfig) -> None:
        """Checks that a run with these settings may resume from it.

        Raises:
            OtherSettings: where the two differ in more than where the work runs.
        """
        try:
            changes = differences(TrainConfig.from_dict(self.config).to_dict(), config.to_dict())
        except (UserError, TypeError) as error:
            changes = [first_line(error)]
        if changes:
            raise OtherSettings(
                f"{self.path} was trained with other settings than this run "
                f"({'; '.join(changes)}): remove this checkpoint, or give another --run"
            )


def snapshot(
    *, values: Mapping[str, Any], model: nn.Module, average: nn.Module, optimizer: Any
) -> Callable[[Path], None]:
    """Copies the state of a training run.

    Args:
        values: the fields of `Checkpoint` but for `path` and `files`.
        model: the network that trains.
        average: the network that is evaluated.
        optimizer: its state may only hold tensors.

    Returns:
        A function that writes the copy as a checkpoint into an existing local folder.
    """
    training = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert isinstance(value, torch.Tensor), f"optimizer state {name!r} is not a tensor"
            training[f"optimizer.{index}.{name}"] = value
    contents = {MODEL: average.state_dict(), TRAINING: training}
    files = {name: tensor_files.to_bytes(tensors) for name, tensors in contents.items()}
    index = {"format": FORMAT, **_plain(values)}

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        records = {name: FileRecord.of(content).to_dict() for name, content in files.items()}
        storage.write_json(str(folder / INDEX), with_hash({**index, "files": records}))

    return write


def read(path: str) -> Checkpoint:
    """Reads a checkpoint folder's index and checks it against its own hash.

    Raises:
        UserError: where it is not a checkpoint, damaged, or of another format, or where a file is
            missing.
    """
    index = storage.join(path, INDEX)
    try:
        record = Record(index, storage.read_json(index))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a checkpoint: {INDEX} is missing") from error
    if (version := record.integer("format")) != FORMAT:
        raise UserError(
            f"{path}: this checkpoint has format {version}, this version of fer_ray reads format "
            f"{FORMAT}: train again"
        )
    check_hash(record)
    files = {name: FileRecord.parse(file) for name, file in record.record("files").records()}
    if files.keys() != {MODEL, TRAINING}:
        raise record.error(f"files are not {MODEL} and {TRAINING}")
    for name in files:
        if not storage.exists(storage.join(path, name)):
            raise _incomplete(path, name)
    return _parse(path, record, files)


def _parse(path: str, record: Record, files: dict[str, FileRecord]) -> Checkpoint:
    history = record.list("history")
    if not all(isinstance(row, dict) and is_finite(row.get(SCORE)) for row in history):
        raise record.error(f"a row of history has no {SCORE}")
    normalizer = record.record("normalizer")
    model = record.record("model")
    model.text("name")
    try:
        return Checkpoint(
            path=path,
            run=record.text("run"),
            environment=record.record("environment").value,
            model=model_config(**model.value),
            labels=record.texts("labels"),
            image_size=record.integer("image_size", MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
            normalizer=Normalizer(
                normalization=normalizer.text("normalization"),
                mean=normalizer.number("mean"),
                std=normalizer.number("std"),
            ),
            flip_at_test=record.boolean("flip_at_test"),
            precision=record.get("precision", "an arithmetic", lambda v: v in precision.ORDER),
            compiled=record.boolean("compiled"),
            epoch=record.integer("epoch", len(history), len(history)),
            history=history,
            config=record.record("config").value,
            files=files,
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error


def _incomplete(path: str, name: str) -> UserError:
    return UserError(f"{path}: the checkpoint is incomplete: {name} is missing")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses as dicts, so that JSON takes them."""
    model, normalizer = values["model"].to_dict(), asdict(values["normalizer"])
    return {**values, "model": model, "normalizer": normalizer}
