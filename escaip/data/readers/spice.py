"""SPICE in its release layout (HDF5): one group per molecule, bohr, hartree and hartree/bohr.

Eastman et al., Sci. Data 10, 11 (2023); https://github.com/openmm/spice-dataset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.readers.policy import MalformedError, Part, Reader, ReadPolicy, Record, ranges_by_weight
from escaip.data.structure import AtomicData
from escaip.data.validation import check_choice
from escaip.errors import DataError
from escaip.files import one_line
from escaip.units import Units

if TYPE_CHECKING:
    import h5py

ENERGIES = ("dft_total_energy", "formation_energy")
GRADIENT = "dft_total_gradient"
MAX_NUMBERS = 1 << 29
"""Numbers of one dataset, 4 GiB once read: HDF5 lets a small file declare any shape."""

_UNIT_NAMES = {"nanometers": "nm", "nanometer": "nm", "angstroms": "angstrom", "ev": "eV"}
_DAMAGE = (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError, IndexError)

# Bracket atom: isotope, symbol, chirality, hydrogens, charge, map number (OpenSMILES, section 3.1).
_BRACKET_ATOM = re.compile(
    r"(?P<isotope>\d+)?(?P<symbol>[A-Z][a-z]?|[a-z][a-z]?|\*)(?P<chirality>@@?(?:TH[12]|AL[12]|SP[123]|TB\d{1,2}|OH\d{1,2})?)?"
    r"(?P<hydrogens>H\d?)?(?P<charge>\+\d{1,2}|-\d{1,2}|\++|-+)?(?::(?P<map>\d+))?"
)
_OUTSIDE = re.compile(r"(?:Cl|Br|[BCNOPSFIbcnops]|[-=#$:/\\.()%\d~*])*")


def read_spice(
    path: Path,
    name: str,
    policy: ReadPolicy,
    *,
    part: Part | None = None,
    subset: str | Sequence[str] | None = None,
    energy: str = "dft_total_energy",
) -> Iterator[AtomicData]:
    """Yields the conformations of every molecule; forces are minus the gradient, charges come from the mapped SMILES.

    Ids are ``name:molecule:index`` and groups are molecule names. Malformed conformations (NaN or a wrong shape) are
    skipped and counted whatever ``on_error`` says, since releases hold a few. Multipoles, charges and bond orders are
    not read. Units are those the datasets declare, else bohr and hartree, unless the policy states others.

    Options:
        subset: keep the molecules of these subsets only.
        energy: ``dft_total_energy`` or ``formation_energy``.

    Raises:
        DataError: a file that is no HDF5, a missing dataset, a SMILES that contradicts the atoms, an absent subset.
        ConfigError: an unknown ``energy``.
    """
    check_choice("energy", energy, ENERGIES)
    wanted = None if subset is None else {subset} if isinstance(subset, str) else set(subset)
    with _opened(path) as file:
        names = _molecules(file, path)
        if wanted is not None and (part is None or part[0] == 0):
            _check_subsets(file, names, wanted, path)
        for molecule in names if part is None else names[part[0] : part[1]]:
            group = _group(file, molecule, path)
            if wanted is None or _text(group, "subset", path) in wanted:
                yield from policy.admit(_records(group, f"{name}:{molecule}", molecule, energy, policy, path))


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of molecules with about ``size`` conformations together."""
    with _opened(path) as file:
        return ranges_by_weight((_count(_group(file, name, path)) for name in _molecules(file, path)), size)


def smiles_charge(smiles: str, numbers: NDArray[np.int64] | None = None) -> int:
    """Returns the sum of the formal charges of a SMILES; only bracket atoms carry any.

    Args:
        smiles: for example ``[N+:1]([H:2])([H:3])([H:4])[H:5]``.
        numbers: ``(n,)`` atomic numbers; when every atom is mapped, map number ``i`` must be atom ``i − 1``.
    """
    from ase.data import atomic_numbers as number_of

    shown = repr(smiles if len(smiles) <= 60 else smiles[:57] + "...")
    total, mapped = 0, {}
    brackets = re.findall(r"\[([^\[\]]*)\]", smiles)
    for text in brackets:
        match = _BRACKET_ATOM.fullmatch(text)
        if match is None or (match["symbol"] != "*" and match["symbol"].capitalize() not in number_of):
            raise DataError(f"SMILES {shown} holds [{text}], which is no atom")
        if charge := match["charge"]:
            digits = charge.lstrip("+-")
            total += (1 if charge[0] == "+" else -1) * (int(digits) if digits else len(charge))
        if match["map"] is not None:
            mapped[int(match["map"])] = number_of.get(match["symbol"].capitalize(), 0)
    if not _OUTSIDE.fullmatch(re.sub(r"\[[^\[\]]*\]", "", smiles)):
        raise DataError(f"SMILES {shown} cannot be read")
    expected = dict(enumerate([] if numbers is None else numbers.tolist(), start=1))
    if numbers is not None and mapped and len(mapped) == len(brackets) and mapped != expected:
        raise DataError(f"SMILES {shown} does not have the same atoms as atomic_numbers")
    return total


def _opened(path: Path) -> h5py.File:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file, or truncated ({error})") from error


def _molecules(file: h5py.File, path: Path) -> list[str]:
    names = list(file)
    if not names:
        raise DataError(f"{path}: holds no molecules")
    return names


def _group(file: h5py.File, name: str, path: Path) -> h5py.Group:
    import h5py

    try:
        group = file[name]
    except (KeyError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: molecule {name!r} cannot be read, the file is damaged ({error})") from error
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path}: {name!r} is a dataset, expected one group per molecule (SPICE layout)")
    return group


def _count(group: h5py.Group) -> int:
    """Conformations of a molecule; 0 where it has none that could be counted."""
    shape = getattr(group.get("conformations"), "shape", ())
    return int(shape[0]) if shape else 0


def _check_subsets(file: h5py.File, names: Sequence[str], wanted: set[str], path: Path) -> None:
    """Refuses a subset without molecules before anything is read."""
    seen: set[str] = set()
    for name in names:
        seen.add(_text(_group(file, name, path), "subset", path))
        if wanted <= seen:
            return
    raise DataError(f"{path}: no molecule of subset {sorted(wanted - seen)}; found {sorted(seen)[:20]}")


def _records(group: h5py.Group, place: str, name: str, energy: str, policy: ReadPolicy, path: Path) -> Iterator[Record]:
    """Conformations of a molecule; one that cannot be read counts as bad once for each of them."""
    try:
        yield from _conformations(group, place, name, energy, policy, path)
    except DataError as error:
        for index in range(max(_count(group), 1)):
            yield Record(partial(_refuse, DataError(f"{place}:{index}: {error}")))


def _conformations(
    group: h5py.Group, place: str, name: str, energy: str, policy: ReadPolicy, path: Path
) -> Iterator[Record]:
    found = list(group)
    for needed in ("atomic_numbers", "conformations", energy, "smiles"):
        if needed not in found:
            raise DataError(
                f"has no dataset {needed!r}; found {_listed(found)} "
                "(the released SPICE-x.y.z.hdf5 has it; input files without labels cannot be trained on)"
            )
    # Each object is looked up once: that is what reading many small molecules costs.
    numbers, _ = _values(group, "atomic_numbers", np.int64, "")
    positions, length = _values(group, "conformations", np.float64, "bohr")
    energies, unit = _values(group, energy, np.float64, "hartree")
    gradients, force = None, "hartree/bohr"
    if GRADIENT in found:
        gradients, force = _values(group, GRADIENT, np.float64, force)
    charge = smiles_charge(_text(group, "smiles", path), numbers)
    units = policy.units or Units.parse({"length": length, "energy": unit, "forces": force})
    shape = (len(positions), len(numbers), 3)
    fits = positions.shape == shape and energies.shape == shape[:1]
    fits = fits and (gradients is None or gradients.shape == shape)

    def build(index: int) -> AtomicData:
        structure_id = f"{place}:{index}"
        if not fits:
            raise MalformedError(f"{structure_id}: arrays of this molecule disagree in shape")
        gradient = None if gradients is None else gradients[index]
        values = (positions[index], energies[index], *([] if gradient is None else [gradient]))
        if not all(np.isfinite(value).all() for value in values):
            raise MalformedError(f"{structure_id}: malformed conformation (NaN or Inf)")
        return AtomicData.from_arrays(
            numbers,
            positions[index],
            energy=float(energies[index]),
            forces=None if gradient is None else -gradient,
            charge=charge,
            structure_id=structure_id,
            group=name,
            units=units,
        )

    for index in range(len(positions)):
        yield Record(partial(build, index), lambda: f"datasets {_listed(found)}")


def _refuse(error: DataError) -> AtomicData:
    raise error


def _values(group: h5py.Group, name: str, dtype: type[np.generic], unit: str) -> tuple[NDArray[Any], str]:
    """Numbers of a dataset, which has at least one axis, and their unit: the one it declares, else ``unit``."""
    try:
        dataset = group[name]
        shape = dataset.shape
        if not shape or dataset.dtype.kind not in "iuf":
            raise TypeError("is no array of numbers")
        if math.prod(shape) > MAX_NUMBERS:
            raise ValueError(f"has shape {shape}, more than any molecule needs")
        values = np.asarray(dataset[()], dtype=dtype)
        declared = dataset.attrs.get("units", unit) if unit else ""
    except _DAMAGE as error:
        raise DataError(f"{name!r} cannot be read, {one_line(error)}") from error
    text = declared.decode() if isinstance(declared, bytes) else str(declared)
    return values, _UNIT_NAMES.get(text.lower(), text)


def _text(group: h5py.Group, dataset: str, path: Path) -> str:
    try:
        value = group[dataset][0]
    except _DAMAGE as error:
        name = group.name.lstrip("/")
        raise DataError(
            f"{path}: molecule {name!r} has no readable {dataset!r}; found {_listed(list(group))}"
        ) from error
    return value.decode() if isinstance(value, bytes) else str(value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def matches(path: Path, head: bytes) -> bool:
    """Any HDF5 file."""
    return head.startswith(b"\x89HDF\r\n\x1a\n")


READER = Reader("spice", read_spice, matches, divide)
