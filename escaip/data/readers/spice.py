"""SPICE in its release layout (HDF5): one group per molecule, bohr, hartree and hartree/bohr.

Eastman et al., Sci. Data 10, 11 (2023); https://github.com/openmm/spice-dataset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

ENERGIES = ("dft_total_energy", "formation_energy")
GRADIENT = "dft_total_gradient"
MAX_NUMBERS = 1 << 29
"""Of one dataset, 4 GiB once read: HDF5 lets a small file declare any shape."""

_UNIT_NAMES = {"nanometers": "nm", "nanometer": "nm", "angstroms": "angstrom", "ev": "eV"}

# Bracket atom: isotope, symbol, chirality, hydrogens, charge, map number (OpenSMILES, section 3.1).
_BRACKET_ATOM = re.compile(
    r"(?P<isotope>\d+)?(?P<symbol>[A-Z][a-z]?|[a-z][a-z]?|\*)(?P<chirality>@@?(?:TH[12]|AL[12]|SP[123]|TB\d{1,2}|OH\d{1,2})?)?"
    r"(?P<hydrogens>H\d?)?(?P<charge>\+\d{1,2}|-\d{1,2}|\++|-+)?(?::(?P<map>\d+))?"
)
_OUTSIDE = re.compile(r"(?:Cl|Br|[BCNOPSFIbcnops]|[-=#$:/\\.()%\d~*])*")


@dataclass(frozen=True)
class _Molecule:
    """One group as read, still in the file's units."""

    name: str
    numbers: np.ndarray
    charge: int
    conformations: np.ndarray
    energies: np.ndarray
    gradients: np.ndarray | None
    units: Units
    datasets: str


def read_spice(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    subset: str | Sequence[str] | None = None,
    energy: str = "dft_total_energy",
) -> Iterator[AtomicData]:
    """Conformations of every molecule; forces are minus the gradient, charges come from the mapped SMILES.

    Ids are ``file:molecule:index`` and groups are molecule names. Malformed conformations (NaN or a wrong shape) are
    skipped and counted whatever ``on_error`` says, since releases hold a few. Multipoles, charges and bond orders are
    not read.

    Args:
        path: HDF5 file.
        policy: units (default: those the datasets declare, else bohr and hartree) and error policy.
        name: what ids begin with; default the file's name.
        keys: not used by this source; the layout fixes the names.
        part: molecules to read, by their place in the file, from :func:`divide`.
        subset: keep the molecules of these subsets only.
        energy: ``dft_total_energy`` or ``formation_energy``.

    Raises:
        DataError: a file that is no HDF5, a missing dataset, a SMILES that contradicts the atoms, an absent subset.
        ConfigError: an unknown ``energy``, or label keys.
    """
    if energy not in ENERGIES:
        raise ConfigError(f"energy: {energy!r} is not one of {', '.join(ENERGIES)}")
    if keys is not None:
        raise ConfigError("keys: the SPICE layout fixes its names; choose the energy with energy: formation_energy")
    wanted = None if subset is None else {subset} if isinstance(subset, str) else set(subset)
    name = name or path.name
    with _opened(path) as file:
        names = _molecules(file, path)
        if wanted is not None and (part is None or part[0] == 0):
            _check_subsets(file, names, wanted, path)
        for molecule_name in names if part is None else names[part[0] : part[1]]:
            group = _group(file, molecule_name, path)
            if wanted is not None and _text(group, "subset", path) not in wanted:
                continue
            try:
                molecule = _read_molecule(group, molecule_name, energy, policy, path)
            except DataError as error:
                if policy.on_error == "raise":
                    raise
                _skip_molecule(group, f"{name}:{molecule_name}", error, policy)
                continue
            yield from _structures(molecule, name, policy)


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of molecules with about ``size`` conformations together.

    Raises:
        DataError: a file that is no HDF5, or of another layout.
    """
    parts: list[Part] = []
    start, held = 0, 0
    with _opened(path) as file:
        names = _molecules(file, path)
        for place, molecule in enumerate(names):
            count = _count(_group(file, molecule, path))
            if place > start and held + count > size:
                parts.append((start, place))
                start, held = place, 0
            held += count
    return [*parts, (start, len(names))]


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file, or truncated ({error})") from error


def _molecules(file: Any, path: Path) -> list[str]:
    names = list(file)
    if not names:
        raise DataError(f"{path}: holds no molecules")
    return names


def _group(file: Any, name: str, path: Path) -> Any:
    import h5py

    try:
        group = file[name]
    except (KeyError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: molecule {name!r} cannot be read, the file is damaged ({error})") from error
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path}: {name!r} is a dataset, expected one group per molecule (SPICE layout)")
    return group


def _count(group: Any) -> int:
    """Conformations of a molecule; 0 where it has none that could be counted."""
    shape = getattr(group.get("conformations"), "shape", ())
    return int(shape[0]) if shape else 0


def _skip_molecule(group: Any, name: str, error: DataError, policy: ReadPolicy) -> None:
    """Counts each conformation of a molecule that is left out."""
    for index in range(max(_count(group), 1)):
        policy.report.skip(f"{name}:{index}: {error}")


def _check_subsets(file: Any, names: Sequence[str], wanted: set[str], path: Path) -> None:
    """Refuses a subset that no molecule belongs to, before anything is read."""
    missing = set(wanted)
    seen: set[str] = set()
    for name in names:
        kind = _text(_group(file, name, path), "subset", path)
        seen.add(kind)
        missing.discard(kind)
        if not missing:
            return
    raise DataError(f"{path}: no molecule of subset {sorted(missing)}; found {sorted(seen)[:20]}")


def _read_molecule(group: Any, name: str, energy: str, policy: ReadPolicy, path: Path) -> _Molecule:
    found = list(group)
    for needed in ("atomic_numbers", "conformations", energy, "smiles"):
        if needed not in found:
            raise DataError(
                f"{path}: molecule {name!r} has no dataset {needed!r}; found {_listed(found)} "
                "(the released SPICE-x.y.z.hdf5 has it; input files without labels cannot be trained on)"
            )
    where = f"{path}: molecule {name!r}"
    # Each object is looked up once: that is what reading many small molecules costs.
    numbers, _ = _values(group, "atomic_numbers", np.int64, where)
    conformations, length = _values(group, "conformations", np.float64, where, "bohr")
    energies, unit = _values(group, energy, np.float64, where, "hartree")
    gradients, force = None, "hartree/bohr"
    if GRADIENT in found:
        gradients, force = _values(group, GRADIENT, np.float64, where, force)
    try:
        charge = smiles_charge(_text(group, "smiles", path), numbers)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    units = policy.stated_units or Units.parse({"length": length, "energy": unit, "forces": force})
    return _Molecule(name, numbers, charge, conformations, energies, gradients, units, _listed(found))


def _values(group: Any, name: str, dtype: type, where: str, unit: str = "") -> tuple[np.ndarray, str]:
    """Numbers of a dataset, which has at least one axis, and their unit: the one it declares, else ``unit``."""
    try:
        dataset = group[name]
        kind, shape = dataset.dtype.kind, dataset.shape
        if not shape or kind not in "iuf":
            raise TypeError("is no array of numbers")
        if math.prod(shape) > MAX_NUMBERS:
            raise ValueError(f"has shape {shape}, more than any molecule needs")
        return np.asarray(dataset[()], dtype=dtype), _unit(dataset, unit) if unit else ""
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {name!r} cannot be read, {' '.join(str(error).split())}") from error


def _structures(molecule: _Molecule, file_name: str, policy: ReadPolicy) -> Iterator[AtomicData]:
    from escaip.data.structure import AtomicData

    n = len(molecule.numbers)
    count = len(molecule.conformations)
    gradients = molecule.gradients
    wrong = (
        molecule.conformations.shape != (count, n, 3)
        or molecule.energies.shape != (count,)
        or (gradients is not None and gradients.shape != (count, n, 3))
    )
    for index in range(count):
        structure_id = f"{file_name}:{molecule.name}:{index}"
        if wrong:
            policy.report.skip(f"{structure_id}: arrays of this molecule disagree in shape")
            continue
        finite = np.isfinite(molecule.conformations[index]).all() and np.isfinite(molecule.energies[index])
        if not finite or (gradients is not None and not np.isfinite(gradients[index]).all()):
            policy.report.skip(f"{structure_id}: malformed conformation (NaN or Inf)")
            continue
        build = partial(
            AtomicData.from_arrays,
            molecule.numbers,
            molecule.conformations[index],
            energy=float(molecule.energies[index]),
            forces=None if gradients is None else -gradients[index],
            charge=molecule.charge,
            structure_id=structure_id,
            group=molecule.name,
            units=molecule.units,
        )
        data = policy.admit(build, lambda: f"datasets {molecule.datasets}")
        if data is not None:
            yield data


def smiles_charge(smiles: str, numbers: np.ndarray | None = None) -> int:
    """Sum of the formal charges of a SMILES; only bracket atoms carry any.

    Args:
        smiles: for example ``[N+:1]([H:2])([H:3])([H:4])[H:5]``.
        numbers: ``(n,)`` atomic numbers; when every atom is mapped, map number ``i`` must be atom ``i − 1``.

    Raises:
        DataError: a bracket that is no atom, other text that is no SMILES, or atoms that contradict ``numbers``.
    """
    from ase.data import atomic_numbers as number_of

    total = 0
    mapped: dict[int, int] = {}
    num_brackets = 0
    for text in re.findall(r"\[([^\[\]]*)\]", smiles):
        match = _BRACKET_ATOM.fullmatch(text)
        if match is None or (match["symbol"] != "*" and match["symbol"].capitalize() not in number_of):
            raise DataError(f"SMILES {_short(smiles)} holds [{text}], which is no atom")
        num_brackets += 1
        total += _charge(match["charge"])
        if match["map"] is not None:
            mapped[int(match["map"])] = number_of.get(match["symbol"].capitalize(), 0)
    if not _OUTSIDE.fullmatch(re.sub(r"\[[^\[\]]*\]", "", smiles)):
        raise DataError(f"SMILES {_short(smiles)} cannot be read")
    if numbers is not None and mapped and len(mapped) == num_brackets:
        expected = {index + 1: int(number) for index, number in enumerate(numbers)}
        if mapped != expected:
            raise DataError(f"SMILES {_short(smiles)} does not have the same atoms as atomic_numbers")
    return total


def _charge(text: str | None) -> int:
    if not text:
        return 0
    sign = 1 if text[0] == "+" else -1
    digits = text.lstrip("+-")
    return sign * (int(digits) if digits else len(text))


def _text(group: Any, dataset: str, path: Path) -> str:
    try:
        value = group[dataset][0]
    except (KeyError, ValueError, IndexError, OSError, RuntimeError, AttributeError, TypeError) as error:
        name = group.name.lstrip("/")
        raise DataError(f"{path}: molecule {name!r} has no readable {dataset!r}; found {_listed(group)}") from error
    return value.decode() if isinstance(value, bytes) else str(value)


def _unit(dataset: Any, default: str) -> str:
    value = dataset.attrs.get("units", default)
    text = value.decode() if isinstance(value, bytes) else str(value)
    return _UNIT_NAMES.get(text.lower(), text)


def _listed(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:12]) + (f", ... ({len(listed)} in all)" if len(listed) > 12 else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def matches(path: Path, head: bytes) -> bool:
    """Any HDF5 file."""
    return head.startswith(b"\x89HDF\r\n\x1a\n")


READER = Reader("spice", "SPICE HDF5, one group per molecule", read_spice, matches, parts=divide)
