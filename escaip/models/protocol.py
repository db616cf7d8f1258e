"""The protocol of a model, and the models by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.graph import TokenChunks
from escaip.types import AtomInputs, GraphSettings, ModelOutput

MAX_ATOMIC_NUMBER = 118
DEFAULT_MODEL = "EScAIP"

C = TypeVar("C", bound="ModelConfig")
M = TypeVar("M", bound="type[Model]")


class ModelConfig:
    """Base of the settings of models: subclasses are frozen dataclasses of plain values, checked on construction.

    A subclass states ``graph``, and overrides what does not hold for its model (docs/extend/model.md).

    Attributes:
        PRESETS: named sizes, each a dictionary of fields.
        heads: names of further heads, see ``escaip.nn.heads.HEADS``.
        num_energy_heads: heads of energy and direct forces: 1 for all data sets, or one for each.
        charge, spin: whether the model is conditioned on total charge and on spin multiplicity.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    heads: tuple[str, ...] = ()
    num_energy_heads: int = 1
    charge: bool = False
    spin: bool = False

    @property
    def graph(self) -> GraphSettings:
        """The settings that decide which neighbors an atom attends to."""
        raise NotImplementedError(f"{type(self).__name__} must define graph")

    @property
    def is_conservative(self) -> bool:
        """Whether forces are the negative gradient of the energy; otherwise the model predicts them itself."""
        return True

    @property
    def kept_per_token(self) -> int:
        """About how many numbers automatic differentiation keeps for a token: decides how much is recomputed."""
        return 1024

    def used_per_token(self, differentiate: bool) -> int:
        """Returns, from above, how many numbers a token takes at once: decides how much is evaluated together."""
        return 2 * self.kept_per_token

    def check_graph_skin(self, skin: float) -> None:
        """Raises ConfigError for a graph that cannot be kept while distances change by ``skin`` Å."""
        check_fading_ranks(self.graph, skin)

    def at_width(self: C, hidden_size: int) -> C:
        """Returns the config of the same model at another width, for maximal-update parametrisation.

        Raises:
            ConfigError: the model does not say how it grows, or has no such width.
        """
        raise ConfigError(f"{type(self).__name__} does not say how the model grows: leave base_width out")

    @classmethod
    def preset(cls: type[C], name: str, **overrides: Any) -> C:
        """Returns a named size with fields replaced.

        Raises:
            ConfigError: no such preset, or an unknown field.
        """
        if name not in cls.PRESETS:
            raise ConfigError(f"preset {name!r} does not exist: choose {', '.join(cls.PRESETS) or 'none'}")
        return cls.from_dict({**cls.PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Builds a config from plain values; a key ``preset`` names the size to start from.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or an invalid value.
        """
        values = dict(values)
        if "preset" in values:
            return cls.preset(values.pop("preset"), **values)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f": did you mean {near[0]!r}?" if near else f": known are {', '.join(sorted(known))}"
                raise ConfigError(f"model setting {key!r} does not exist{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``heads`` only where there are some."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        if not values.get("heads"):
            values.pop("heads", None)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


class Model(nn.Module):
    """Base of models: from atoms and tokens to per-atom energies.

    Args:
        config: every number that defines the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, atoms: AtomInputs, tokens: TokenChunks) -> ModelOutput:
        """Computes per-atom energies, direct forces where the model has them, and the outputs of further heads.

        Args:
            atoms: the ``N`` atoms.
            tokens: of all atoms; per-token work goes through ``map``.
        """
        raise NotImplementedError

    def check_systems(self, charge: Tensor, spin_multiplicity: Tensor) -> None:
        """Raises DataError for ``(B,)`` total charges or spin multiplicities that the model cannot take."""

    def parts(self) -> dict[str, list[nn.Module]]:
        """Returns the modules of each part that can be kept from learning, by name; together the whole model."""
        return {name: [child] for name, child in self.named_children()}

    def take_heads(self, chosen: Sequence[int]) -> None:
        """Replaces the heads of energy and direct forces by copies of some, one for each data set, in place.

        Args:
            chosen: positions among the present heads; with one, there is one head for all sets.

        Raises:
            ConfigError: the model does not say how.
        """
        raise ConfigError(f"{type(self).__name__} has one energy head for all data sets: leave num_energy_heads out")

    @torch.no_grad()
    def add_elements(self, new: Sequence[int], known: Sequence[int]) -> None:
        """Starts the features of new atomic numbers from the mean of those of known ones, in place.

        Takes every ``nn.Embedding`` of 119 rows for one of elements; override it for others.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == MAX_ATOMIC_NUMBER + 1:
                module.weight[list(new)] = module.weight[list(known)].mean(0)


class ModelKind(NamedTuple):
    """A registered model.

    Attributes:
        name: stands in model files.
        model: built from a config.
        config: class of the settings.
    """

    name: str
    model: type[Model]
    config: type[ModelConfig]


MODELS: dict[str, ModelKind] = {}
"""Every model by name."""


def register_model(name: str, config: type[ModelConfig]) -> Callable[[M], M]:
    """Returns a class decorator that adds a model to ``MODELS``.

    Args:
        name: stands in model files and, as ``name``, in the settings of a recipe.
        config: class of the settings; of no other model.

    Raises:
        ConfigError: another model has that name or config.
    """

    def register(model: M) -> M:
        kind = ModelKind(name, model, config)
        for other in MODELS.values():
            if (other.name == name or other.config is config) and other != kind:
                raise ConfigError(f"model {name!r} clashes with {other.name!r}: choose another name and config class")
        MODELS[name] = kind
        return model

    return register


def kind_named(name: str) -> ModelKind:
    """Returns the model of a name.

    Raises:
        ConfigError: it is not registered.
    """
    if name not in MODELS:
        known = ", ".join(MODELS)
        raise ConfigError(f"model {name!r} is not registered (there are {known}): import the module that registers it")
    return MODELS[name]


def kind_of(config: ModelConfig) -> ModelKind:
    """Returns the model of a config, found by the type of the config.

    Raises:
        ConfigError: it is not registered.
    """
    for kind in MODELS.values():
        if type(config) is kind.config:
            return kind
    raise ConfigError(f"{type(config).__name__} belongs to no registered model: register it with register_model")


def build_config(settings: dict[str, Any]) -> ModelConfig:
    """Builds a config from the settings of a recipe; a key ``name`` chooses the model, by default EScAIP.

    Raises:
        ConfigError: no such model, or a setting that it does not have.
    """
    values = dict(settings)
    return kind_named(values.pop("name", DEFAULT_MODEL)).config.from_dict(values)


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that ``build_config`` takes."""
    name = kind_of(config).name
    return {**({} if name == DEFAULT_MODEL else {"name": name}), **config.to_dict()}


def check_fading_ranks(graph: GraphSettings, skin: float, fading: bool = True) -> None:
    """Raises ConfigError where a neighbor enters or leaves with a weight, so that a graph with a skin changes results.

    Args:
        graph: hard or truncated ranks jump.
        skin: Å; nothing is wrong with 0.
        fading: whether everything else fades with the envelope.
    """
    if skin > 0.0 and not (fading and (graph.num_neighbors is None or (graph.soft and graph.rank_truncation is None))):
        raise ConfigError(
            "the graph of this model cannot be kept while atoms move: its neighbors enter and leave with a jump "
            "(hard or truncated ranks, or uniform weights), so leave graph_skin out"
        )
