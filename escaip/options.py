"""Options that several commands share; importing this module is cheap."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class ModelOptions(TypedDict, total=False):
    """Where and how precisely a model runs.

    Args:
        device: auto, cpu, cuda or cuda:N (default: auto)
        dtype: precision of the model (default: as stored)
        precision: precision of matrix products; less than highest is faster on GPUs and costs digits
        dataset: data set whose atomic energies are used, for a model trained on several
    """

    device: str
    dtype: Literal["float32", "float64"] | None
    precision: Literal["highest", "tf32", "float16", "bfloat16"]
    dataset: str | None


class ReadOptions(TypedDict, total=False):
    """How a data file is read.

    Args:
        format: reader (default: from the file)
        keys: names of the labels in the file, such as --keys.energy REF_energy
        units: units of the file where they are not Å and eV, such as --units.length bohr --units.energy hartree
        set: options of the layout, such as --set.energy total
        max_force: leave out structures with a larger force, in eV/Å
        limit: read the first N structures only
    """

    format: str | None
    keys: dict[str, str] | None
    units: dict[str, str] | None
    set: dict[str, Any] | None
    max_force: float | None
    limit: int | None
