"""Types and options of command-line parameters; importing this module is cheap."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from typing_extensions import TypedDict

# The second part tells the command line what to check before anything heavy is imported, and what to complete.
ModelFile: TypeAlias = Annotated[str, "model"]
"""A ``.escaip`` or ``.ckpt`` file, an exported package, or ``example:NAME``."""
StructureFile: TypeAlias = Annotated[str, "structure"]
"""Anything that ASE reads, or ``example:NAME``."""
DataPath: TypeAlias = Annotated[str, "data"]
"""A data file or folder of any supported layout, a prepared store, or ``dataset:NAME/FILE``."""


class ModelOptions(TypedDict, total=False):
    """Where and how precisely a model runs.

    Args:
        device: auto, cpu, cuda or cuda:N (default: auto)
        dtype: precision of the model (default: as stored)
        precision: precision of matrix products; less than highest is faster on GPUs and costs digits (default: highest)
        dataset: data set whose atomic energies are used, for a model trained on several
    """

    device: str
    dtype: Literal["float32", "float64"]
    precision: Literal["highest", "tf32", "float16", "bfloat16"]
    dataset: str


class CalculatorOptions(ModelOptions, total=False):
    """How a model is evaluated in a simulation.

    Args:
        compile: compile the model, which takes a minute once per configuration and machine
        committee: further members beside MODEL; their mean is used, their spread is known
        d3: add D3 dispersion with the parameters of this functional, such as pbe; not to a model trained with it
        d3_damping: damping of the dispersion (default: bj)
        charge: total charge of structures that state none in the file
        spin: spin multiplicity of structures that state none in the file
    """

    compile: bool
    committee: list[ModelFile]
    d3: str
    d3_damping: Literal["bj", "zero", "bjm", "zerom", "op"]
    charge: int
    spin: int


class ReadOptions(TypedDict, total=False):
    """How a data file is read.

    Args:
        format: layout of the file (default: recognised from the file)
        keys: names of labels in the file, such as --keys.energy REF_energy
        units: units of the file where they are not Å and eV, such as --units.length bohr --units.energy hartree
        set: options of the layout, such as --set.energy total
        max_force: leave out structures with a larger force, in eV/Å
        limit: read the first N structures only
    """

    format: Literal["aselmdb", "ase", "mptrj", "oc20", "ocp_lmdb", "pyg", "pymatgen", "spice", "store", "xyz_zip"]
    keys: dict[str, str]
    units: dict[str, str]
    set: dict[str, Any]
    max_force: float
    limit: int
