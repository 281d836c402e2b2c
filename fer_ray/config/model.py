"""The model's section of the configuration: each network has options of its own."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fer_ray import storage
from fer_ray.config.fields import Section, choice, number
from fer_ray.config.registries import MODELS
from fer_ray.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MODEL = "custom_cnn"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, abc.ABC):
    """A network and its options. Each network has a subclass, which `model_config` chooses."""

    section: ClassVar[str] = "model"
    faster_in_bfloat16: ClassVar[bool] = True
    """Whether CPUs that have bfloat16 instructions train it faster with them."""
    faster_compiled: ClassVar[bool] = False
    """Whether CPUs train it faster when it is compiled, enough for ``--compile auto``."""
    has_batch_norm: ClassVar[bool] = True
    """Whether it may have batch-norm layers: if so, workers compute whole groups of images."""

    name: str = choice(DEFAULT_MODEL, MODELS, flag="model")
    """The network."""
    input_size: int = number(0, 0, 1024)
    """Height and width in pixels of the network's input; 0: the size of the prepared images."""

    def __post_init__(self) -> None:
        """Takes the name under which the class is registered, then checks every field."""
        names = [name for name, network in MODELS.items() if network is type(self)]
        if names and self.name not in names:
            object.__setattr__(self, "name", names[0])
        super().__post_init__()

    @abc.abstractmethod
    def build(self, *, num_classes: int, input_size: int) -> nn.Module:
        """Builds the network with fresh weights, drawn from torch's global generator.

        Args:
            num_classes: labels of the data set.
            input_size: height and width of the input in pixels; `input_size` of the
                configuration, or the size of the prepared images where that is 0.

        Returns:
            A module from (N, 1, S, S) float to (N, num_classes) logits, S being `input_size`.

        Raises:
            UserError: for options that do not fit together, such as a file that is missing.
        """

    @classmethod
    def variants(cls) -> list[tuple[str, Self]]:
        """The configurations that ``--list-models`` shows, each with a title."""
        default = cls()
        return [(default.name, default)]

    @property
    def is_small(self) -> bool:
        """Whether one small image goes through it on a CPU in well under a second."""
        return True

    def with_fresh_weights(self) -> Self:
        """The same network without files of initial weights: a checkpoint brings its own."""
        files = {setting.field: setting.default for setting in self.settings() if setting.is_file}
        return dataclasses.replace(self, **files)

    def with_absolute_files(self) -> Self:
        """The same network with absolute paths of files: workers run in another directory."""
        files: dict[str, Any] = {
            setting.field: storage.absolute(value)
            for setting in self.settings()
            if setting.is_file
            and (value := getattr(self, setting.field)) not in ("", *setting.names)
        }
        return dataclasses.replace(self, **files)

    def options(self) -> dict[str, Any]:
        """The options that differ from the network's defaults, by field."""
        default = type(self)().to_dict()
        return {
            field_: value
            for field_, value in self.to_dict().items()
            if value != default[field_] and field_ not in ("name", "input_size")
        }


def model_config(name: str = DEFAULT_MODEL, **options: Any) -> ModelConfig:
    """The configuration of a network.

    Args:
        name: one of `MODELS`.
        options: values by field; absent ones get the network's defaults.

    Raises:
        UserError: for an unknown network, an option that it does not have, or a value that is
            not allowed.
    """
    network = MODELS[name]
    known = [setting.field for setting in network.settings()]
    for option in options:
        if option in known:
            continue
        owners = [other for other in MODELS if option in _fields_of(MODELS[other])]
        if owners:
            flag = next(s.flag for s in MODELS[owners[0]].settings() if s.field == option)
            raise UserError(
                f"{flag}: --model {name} has no such option; {' and '.join(owners)} "
                f"{'has' if len(owners) == 1 else 'have'} it"
            )
        raise unknown(f"options of --model {name}", option, known)
    return network(name=name, **options)


def _fields_of(network: type[ModelConfig]) -> list[str]:
    return [setting.field for setting in network.settings()]
