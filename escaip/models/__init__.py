"""Models: from atoms and tokens to per-atom energies. A model is a file here, or anywhere, and its registration."""

from escaip.models.config import EScAIPConfig
from escaip.models.escaip import EScAIP
from escaip.models.protocol import (
    MAX_ATOMIC_NUMBER,
    MODELS,
    Model,
    ModelConfig,
    ModelKind,
    build_config,
    kind_named,
    kind_of,
    register_model,
    settings_of,
)

__all__ = [
    "MAX_ATOMIC_NUMBER",
    "MODELS",
    "EScAIP",
    "EScAIPConfig",
    "Model",
    "ModelConfig",
    "ModelKind",
    "build_config",
    "kind_named",
    "kind_of",
    "register_model",
    "settings_of",
]
