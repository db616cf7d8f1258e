"""The commands ``vibrations``, ``eos``, ``elastic``, ``phonons`` and ``neb``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict, Unpack

from escaip.errors import ConfigError
from escaip.options import ModelFile, StructureFile


class _Options(TypedDict, total=False):
    """Options of every property.

    Args:
        fmax: largest force after the relaxation, in eV/Å (default: 0.001; of a band: 0.05)
        steps: give up relaxing after this many (default: 500)
        out: folder for results and plots (default: the name of the command)
        frame: which structure of the file (default: the last)
        device: auto, cpu, cuda or cuda:N (default: auto)
        dtype: precision of the model (default: float64, since small differences matter)
        dataset: data set whose atomic energies are used, for a model trained on several
        charge: total charge of structures that state none in the file
        spin: spin multiplicity of structures that state none in the file
    """

    fmax: float
    steps: int
    out: str
    frame: int
    device: str
    dtype: Literal["float32", "float64"]
    dataset: str
    charge: int
    spin: int


def vibrations(
    model: ModelFile,
    structure: StructureFile,
    *,
    relax: Literal["ions", "none"] = "ions",
    finite_differences: bool = False,
    step: float = 0.01,
    **options: Unpack[_Options],
) -> None:
    """Computes harmonic frequencies and modes of a molecule.

    Args:
        model: a model file
        structure: anything ASE reads
        relax: relax the molecule first
        finite_differences: differentiate forces numerically, for models whose forces are no derivatives
        step: displacement of the finite differences in Å

    Example: escaip vibrations example:organic example:ethanol
    """
    _run(
        "vibrations", "molecular_vibrations", model, [structure], options, relaxation=relax, step=step,
        finite_differences=finite_differences,
    )  # fmt: skip


def eos(
    model: ModelFile,
    structure: StructureFile,
    *,
    relax: Literal["full", "ions", "none"] = "full",
    span: float = 0.06,
    points: int = 9,
    **options: Unpack[_Options],
) -> None:
    """Fits an equation of state: equilibrium volume, bulk modulus and its pressure derivative.

    Args:
        model: a model file
        structure: anything ASE reads
        relax: relax first; full is atoms and cell
        span: volumes within 1 ± SPAN of the first
        points: number of volumes

    Example: escaip eos example:silicon example:Si
    """
    _run("eos", "fit_equation_of_state", model, [structure], options, relaxation=relax, span=span, points=points)


def elastic(
    model: ModelFile,
    structure: StructureFile,
    *,
    relax: Literal["full", "ions", "none"] = "full",
    strain: float = 0.005,
    symprec: float = 1e-3,
    symmetry: bool = True,
    **options: Unpack[_Options],
) -> None:
    """Computes the elastic constants of a crystal.

    Args:
        model: a model file
        structure: anything ASE reads
        relax: relax first; full is atoms and cell
        strain: strain applied in both directions
        symprec: tolerance of the symmetry in Å
        symmetry: average over the symmetry of the crystal

    Example: escaip elastic example:silicon example:Si
    """
    _run(
        "elastic", "elastic_constants", model, [structure], options, relaxation=relax, strain=strain, symprec=symprec,
        symmetrize=symmetry,
    )  # fmt: skip


def phonons(
    model: ModelFile,
    structure: StructureFile,
    *,
    relax: Literal["full", "ions", "none"] = "full",
    supercell: tuple[int, int, int] | None = None,
    min_length: float = 12.0,
    displacement: float = 0.01,
    hessian: bool = False,
    mesh: float = 60.0,
    symprec: float = 1e-4,
    **options: Unpack[_Options],
) -> None:
    """Computes phonon bands, density of states and harmonic free energy of a crystal.

    Args:
        model: a model file
        structure: anything ASE reads
        relax: relax first; full is atoms and cell
        supercell: repeats along the three axes (default: what --min-length asks for)
        min_length: smallest edge of the supercell in Å
        displacement: displacement of atoms in Å
        hessian: use second derivatives of the supercell instead of displaced atoms
        mesh: length in Å that sets the density of q-points
        symprec: tolerance of the symmetry in Å

    Example: escaip phonons example:silicon example:Si
    """
    _run(
        "phonons", "crystal_phonons", model, [structure], options, relaxation=relax, supercell=supercell, mesh=mesh,
        min_length=min_length, displacement=displacement, hessian=hessian, symprec=symprec,
    )  # fmt: skip


def neb(
    model: ModelFile,
    initial: StructureFile,
    final: StructureFile,
    *,
    relax: Literal["ions", "none"] = "ions",
    images: int = 5,
    spring: float = 0.1,
    optimizer: Literal["fire", "bfgs"] = "fire",
    climb: bool = True,
    **options: Unpack[_Options],
) -> None:
    """Finds the minimum-energy path and the barrier between two structures.

    Args:
        model: a model file
        initial: anything ASE reads
        final: the same atoms in the same order and cell
        relax: relax the ends first
        images: images between the ends
        spring: spring constant between images in eV/Å²
        optimizer: algorithm
        climb: let the highest image climb to the saddle point

    Example: escaip neb model.escaip before.xyz after.xyz --images 7
    """
    _run(
        "neb", "minimum_energy_path", model, [initial, final], options, relaxation=relax, images=images, spring=spring,
        optimizer=optimizer, climb=climb,
    )  # fmt: skip


def _run(
    name: str, function: str, model: str, structures: list[str], options: Mapping[str, Any], **settings: Any
) -> None:
    """Applies a function of ``escaip.properties`` to structure files, writes its result and prints a summary.

    Raises:
        ConfigError: ``out`` is a file.
        EscaipError: as the calculator, the readers and the property.
    """
    given: dict[str, Any] = {"dtype": "float64", "out": name, "frame": -1, **options}
    out, frame = given.pop("out"), given.pop("frame")
    settings |= {name: given.pop(name) for name in ("fmax", "steps") if name in given}
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    from escaip import properties
    from escaip.calculators.ase import EScAIPCalculator
    from escaip.properties.phonons import check_phonopy
    from escaip.simulate.output import read_structure

    if function == "crystal_phonons":
        check_phonopy()  # before the model is loaded
    atoms = [read_structure(path, frame) for path in structures]
    atoms[0].calc = calculator = EScAIPCalculator(model, **given)
    result = getattr(properties, function)(*atoms, **settings)
    result.write(out, getattr(calculator, "origin", None))
    print(f"{result.summary()}\nwrote {out}")
