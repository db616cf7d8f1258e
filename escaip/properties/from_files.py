"""From files to a folder: what the commands ``vibrations``, ``eos``, ``elastic``, ``phonons`` and ``neb`` call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ase import Atoms

from escaip.errors import ConfigError
from escaip.simulate.output import read_structure

Result = Any
"""Of one of the properties: with ``summary()`` and ``write(folder)``."""


def property_files(
    name: str,
    model: str | os.PathLike[str],
    structures: list[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    frame: int = -1,
    calculator: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Computes a property of a structure file with a model file, and writes it into a folder.

    Args:
        name: ``"vibrations"``, ``"eos"``, ``"elastic"``, ``"phonons"`` or ``"neb"``.
        model: ``.ckpt`` or ``.escaip``.
        structures: a file, or two for ``"neb"``.
        out: folder, made when needed.
        frame: which structure of each file.
        calculator: options of :class:`~escaip.EScAIPCalculator`.
        **settings: of the function of that name in :mod:`escaip.properties`.

    Returns:
        What that function returns.

    Raises:
        EscaipError: as the calculator, the readers and that function.
    """
    compute = _function(name)
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    atoms = [read_structure(path, frame) for path in structures]
    _attach(atoms[0], model, calculator or {})
    result = compute(*atoms, **settings)
    result.write(out)
    return result


def _function(name: str) -> Any:
    if name == "vibrations":
        from escaip.properties.vibrations import molecular_vibrations

        return molecular_vibrations
    if name == "eos":
        from escaip.properties.equation_of_state import fit_equation_of_state

        return fit_equation_of_state
    if name == "elastic":
        from escaip.properties.elastic import elastic_constants

        return elastic_constants
    if name == "phonons":
        from escaip.properties.phonons import check_phonopy, crystal_phonons

        check_phonopy()  # before the model is loaded
        return crystal_phonons
    if name == "neb":
        from escaip.properties.neb import minimum_energy_path

        return minimum_energy_path
    raise ConfigError(f"no property is named {name!r}: choose vibrations, eos, elastic, phonons or neb")


def _attach(atoms: Atoms, model: str | os.PathLike[str], options: dict[str, Any]) -> None:
    from escaip.calculators.ase import EScAIPCalculator

    atoms.calc = EScAIPCalculator(model, **options)
