"""escaip: attention-based interatomic potentials, from files to molecular dynamics."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EScAIP", "EScAIPCalculator", "EScAIPConfig", "Potential", "__version__", "load_potential"]

if TYPE_CHECKING:
    from escaip.calculators.ase import EScAIPCalculator
    from escaip.models import EScAIP, EScAIPConfig
    from escaip.potential import Potential
    from escaip.potential.loading import load_potential


def lazy_names(
    package: str, names_of: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` of a package that imports its names on first use, to start fast.

    Args:
        package: its name.
        names_of: the public names in each of its modules.
    """
    module_of = {name: module for module, names in names_of.items() for name in names}

    def get(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(module_of)


__getattr__ = lazy_names(__name__, {
    "models": ("EScAIP", "EScAIPConfig"), "potential": ("Potential",), "potential.loading": ("load_potential",),
    "calculators.ase": ("EScAIPCalculator",),
})[0]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
