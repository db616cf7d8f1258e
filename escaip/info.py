"""The commands ``info``, ``examples`` and ``recipes``: model files, this installation, what comes with it."""

from __future__ import annotations

import json as jsonlib
import os
import platform
from typing import TYPE_CHECKING, Any

from escaip.files import config_path, list_configs, list_examples, sha256
from escaip.options import ModelFile

if TYPE_CHECKING:
    from escaip.potential import Potential


def info(model: ModelFile | None = None, *, json: bool = False) -> None:
    """Describes a model file; without one, this installation.

    Args:
        model: a model file
        json: print JSON

    Example: escaip info example:organic
    """
    print(render(describe_model(model) if model else describe_installation(), as_json=json))


def examples() -> None:
    """Lists the potentials and structures that come with the package.

    Example: escaip md example:organic example:ethanol
    """
    for kind in ("model", "structure"):
        names = [f"example:{name}" for name in list_examples(kind)]
        print(f"{'potentials' if kind == 'model' else 'structures'}: {', '.join(names)}")


def recipes() -> None:
    """Lists the recipes that fit, validate and test take as --config.

    Example: escaip fit --config quickstart
    """
    names = list_configs()
    width = max(map(len, names)) + 2
    for name in names:
        first = config_path(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<{width}}{first.lstrip('# ').rstrip('.')}")


def describe_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything a model file says of itself, as plain JSON values; no data is loaded, and no code of a package is run.

    Raises:
        CheckpointError: missing, damaged, unsafe, or of another schema.
    """
    from ase.data import chemical_symbols

    from escaip.files import resolve
    from escaip.potential.export import describe_package, is_package
    from escaip.potential.loading import read_potential

    path = resolve(path)
    potential = read_potential(path)
    description = potential.describe()
    metadata = description["metadata"]
    names = potential.datasets or ("",)
    rows = {name: (row, scale) for name, row, scale in zip(names, *_by_set(potential), strict=True)}
    return {
        "file": os.fspath(path),
        "sha256": sha256(path),
        "schema": description["schema"],
        "architecture": description["architecture"],
        "parameters": sum(parameter.numel() for parameter in potential.model.parameters()),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "forces": "conservative" if potential.config.is_conservative else "direct",
        "elements": [chemical_symbols[z] for z in metadata["elements"]] or "any (untrained)",
        "level_of_theory": metadata["level_of_theory"],
        "datasets": metadata["datasets"],
        "units": description["units"],
        "cutoff": potential.cutoff,
        "repulsion_below": _onsets(potential),
        "force_scale": {name: scale for name, (_, scale) in rows.items()} if potential.datasets else rows[""][1],
        "element_references": {name: row for name, (row, _) in rows.items()} if potential.datasets else rows[""][0],
        "config": description["config"],
        "provenance": metadata["provenance"],
        **({"package": describe_package(path)} if is_package(path) else {}),
    }


def _onsets(potential: Potential) -> str | list[float]:
    """Å, the least and the largest distance of two elements below which atoms repel each other."""
    if not potential.repulsion:
        return "none"
    elements = list(potential.metadata.elements) or slice(1, None)
    onsets = potential.repulsion.onset[elements][:, elements]
    return [round(float(onsets.min()), 3), round(float(onsets.max()), 3)]


def _by_set(potential: Potential) -> tuple[list[dict[str, float]], list[float]]:
    """Element references by symbol, and the scale, of each set."""
    from ase.data import chemical_symbols

    elements = potential.metadata.elements
    tables = []
    for row in potential.element_references.reshape(-1, len(chemical_symbols)).tolist():
        kept = [z for z in range(1, len(row)) if row[z] == row[z] and (z in elements if elements else row[z] != 0.0)]
        tables.append({chemical_symbols[z]: row[z] for z in kept})
    return tables, potential.scale.reshape(-1).tolist()


def describe_installation() -> dict[str, Any]:
    """Versions, devices and attention backends, as plain JSON values."""
    import importlib.metadata

    import torch

    from escaip import __version__
    from escaip.ops.backends import BACKENDS

    versions = {}
    for name in ("torch", "lightning", "torch-geometric", "ase", "pymatgen", "vesin", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "escaip": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "cuda": devices or "none usable",
        "cpu_threads": torch.get_num_threads(),
        "attention_backends": {info.name: info.summary() for info in BACKENDS},
    }


def render(description: dict[str, Any], as_json: bool = False) -> str:
    """Returns text for a terminal, or JSON."""
    if as_json:
        return jsonlib.dumps(description, indent=1, ensure_ascii=False)
    width = max(len(key) for key in description) + 2
    return "\n".join(_lines(description, width, ""))


def _lines(values: dict[str, Any], width: int, indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}")
            inner = max(len(str(name)) for name in value) + 2
            lines.extend(_lines(value, inner, indent + "  "))
        else:
            lines.append(f"{indent}{key:<{width}}{_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value) or "none"
    if isinstance(value, dict):
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
