"""The commands ``info``, ``examples`` and ``recipes``: model files, this installation, what comes with it."""

from __future__ import annotations

import json as jsonlib
import os
import platform
from pathlib import Path
from typing import Any

from escaip.errors import CheckpointError
from escaip.files import config_path, first_line, list_configs, list_examples, model_file, sha256
from escaip.options import ModelFile
from escaip.potential.model_file import is_archive, migrate, read_model_file


def info(model: ModelFile | None = None, *, json: bool = False) -> None:
    """Describes a model file; without one, this installation.

    Args:
        model: a model file
        json: print JSON

    Example: escaip info example:organic
    """
    description = describe_model(model) if model else describe_installation()
    print(jsonlib.dumps(description, indent=1, ensure_ascii=False) if json else "\n".join(_lines(description)))


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
    """Returns everything that a model file says of itself, as plain JSON values.

    No code of a package is run, and an ``.escaip`` file is read without importing torch.

    Raises:
        CheckpointError: missing, damaged, unsafe, or of another schema.
    """
    import numpy as np
    from ase.data import chemical_symbols

    file = model_file(path)
    description, weights, package = _read(file)
    description = migrate(description, file)
    try:
        metadata, config = description["metadata"], description["config"]
        arrays = {name: np.asarray(weight) for name, weight in weights.items()}
        model = [array for name, array in arrays.items() if name.startswith("model.")]
        references = arrays["element_references"].reshape(-1, len(chemical_symbols))
        scales = arrays["scale"].reshape(-1).tolist()
        sets = metadata["datasets"] if arrays["element_references"].ndim == 2 else [""]
        rows = dict(zip(sets, (_by_symbol(row, metadata["elements"]) for row in references), strict=True))
        return {
            "file": os.fspath(file),
            "sha256": sha256(file),
            "schema": description["schema"],
            "architecture": description["architecture"],
            "parameters": sum(array.size for array in model),
            "dtype": str(model[0].dtype),
            "forces": config.get("forces", "conservative"),
            "energy_heads": config.get("num_energy_heads", 1),
            "elements": [chemical_symbols[z] for z in metadata["elements"]] or "any (untrained)",
            "level_of_theory": metadata["level_of_theory"],
            "datasets": metadata["datasets"],
            "provenance": metadata["provenance"],
            "units": description["units"],
            "cutoff": description["cutoff"],
            "repulsion_below": _onsets(arrays.get("repulsion.onset"), metadata["elements"]),
            "guarded_below": _onsets(arrays.get("core_guard.onset"), metadata["elements"]),
            "bonds_held_beyond": _onsets(arrays.get("bond_guard.start"), metadata["elements"]),
            "force_scale": scales[0] if sets == [""] else dict(zip(sets, scales, strict=True)),
            "element_references": rows[""] if sets == [""] else rows,
            "config": config,
            **({"package": package} if package else {}),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a whole potential ({first_line(error)})") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns description and weights and, for a package, what its code was compiled for."""
    if is_archive(file) or file.suffix == ".pt2":
        from escaip.potential.export import describe_package, is_package, read_package

        if is_package(file):
            return *read_package(file), describe_package(file)
    return *read_model_file(file, "np"), {}


def _onsets(onset: Any, elements: list[int]) -> str | list[float]:
    """Returns the least and the largest onset of two elements, in Å."""
    if onset is None or not onset.any():
        return "none"
    import numpy as np

    chosen = elements or list(range(1, len(onset)))
    among = onset[np.ix_(chosen, chosen)]
    return [round(float(among.min()), 3), round(float(among.max()), 3)]


def _by_symbol(row: Any, elements: list[int]) -> dict[str, float]:
    from ase.data import chemical_symbols

    known = [(z, value) for z, value in enumerate(row.tolist()) if z and value == value]  # NaN: none
    return {chemical_symbols[z]: value for z, value in known if (z in elements if elements else value != 0.0)}


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


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    lines, width = [], max(map(len, values)) + 2
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}{_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        texts = [str(one) for one in value]
        return ("; " if any(" " in text for text in texts) else " ").join(texts) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
