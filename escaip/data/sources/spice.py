"""SPICE in its release layout (HDF5): one group per molecule, bohr, hartree and hartree/bohr.

Eastman et al., Sci. Data 10, 11 (2023); https://github.com/openmm/spice-dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.labels import LabelKeys
from escaip.data.sources.door import Door
from escaip.data.sources.registry import Part, Source
from escaip.errors import ConfigError, DataError
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

ENERGIES = ("dft_total_energy", "formation_energy")
GRADIENT = "dft_total_gradient"
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
    door: Door,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    subset: str | Sequence[str] | None = None,
    energy: str = "dft_total_energy",
) -> Iterator[AtomicData]:
    """Conformations of every molecule; forces are minus the gradient, charges come from the mapped SMILES.

    Ids are ``file:molecule:index`` and groups are molecule names. Malformed conformations (NaN or a wrong shape) are
    skipped and counted whatever ``on_error`` says, since releases hold a few.

    Args:
        path: HDF5 file.
        door: units (default: those the datasets declare, else bohr and hartree) and error policy.
        name: what ids begin with; default the file's name.
        keys: not used by this source; the layout fixes the names.
        part: not used yet: files are read whole.
        subset: keep the molecules of these subsets only.
        energy: ``dft_total_energy`` or ``formation_energy``.

    Raises:
        DataError: a file that is no HDF5, a missing dataset, a SMILES that contradicts the atoms, an absent subset.
        ConfigError: an unknown ``energy``, or label keys.
    """
    import h5py

    if energy not in ENERGIES:
        raise ConfigError(f"energy: {energy!r} is not one of {', '.join(ENERGIES)}")
    if keys is not None:
        raise ConfigError("keys: the SPICE layout fixes its names; choose the energy with energy: formation_energy")
    wanted = None if subset is None else {subset} if isinstance(subset, str) else set(subset)
    name = name or path.name
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file, or truncated ({error})") from error
    seen: set[str] = set()
    matched = False
    with file:
        for molecule_name in file:
            group = file[molecule_name]
            if not isinstance(group, h5py.Group):
                raise DataError(
                    f"{path}: {molecule_name!r} is a dataset, expected one group per molecule (SPICE layout)"
                )
            if wanted is not None:
                kind = _text(group, "subset", path)
                seen.add(kind)
                if kind not in wanted:
                    continue
            matched = True
            yield from _structures(_read_molecule(group, molecule_name, energy, door, path), name, door)
    if not matched:
        detail = (
            f"no molecule of subset {sorted(wanted)}; found {sorted(seen)[:20]}" if wanted else "holds no molecules"
        )
        raise DataError(f"{path}: {detail}")


def _read_molecule(group: Any, name: str, energy: str, door: Door, path: Path) -> _Molecule:
    for needed in ("atomic_numbers", "conformations", energy, "smiles"):
        if needed not in group:
            raise DataError(
                f"{path}: molecule {name!r} has no dataset {needed!r}; found {_listed(group)} "
                "(the released SPICE-x.y.z.hdf5 has it; input files without labels cannot be trained on)"
            )
    numbers = np.asarray(group["atomic_numbers"][()], dtype=np.int64)
    units = door.stated_units or Units.parse(
        {
            "length": _unit(group["conformations"], "bohr"),
            "energy": _unit(group[energy], "hartree"),
            "forces": _unit(group[GRADIENT], "hartree/bohr") if GRADIENT in group else "hartree/bohr",
        }
    )
    try:
        charge = smiles_charge(_text(group, "smiles", path), numbers)
    except DataError as error:
        raise DataError(f"{path}: molecule {name!r}: {error}") from error
    return _Molecule(
        name=name,
        numbers=numbers,
        charge=charge,
        conformations=np.asarray(group["conformations"][()], dtype=np.float64),
        energies=np.asarray(group[energy][()], dtype=np.float64),
        gradients=np.asarray(group[GRADIENT][()], dtype=np.float64) if GRADIENT in group else None,
        units=units,
        datasets=_listed(group),
    )


def _structures(molecule: _Molecule, file_name: str, door: Door) -> Iterator[AtomicData]:
    from escaip.data.atomic_data import AtomicData

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
            door.report.skip(f"{structure_id}: arrays of this molecule disagree in shape")
            continue
        finite = np.isfinite(molecule.conformations[index]).all() and np.isfinite(molecule.energies[index])
        if not finite or (gradients is not None and not np.isfinite(gradients[index]).all()):
            door.report.skip(f"{structure_id}: malformed conformation (NaN or Inf)")
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
        data = door.admit(build, lambda: f"datasets {molecule.datasets}")
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
    if dataset not in group or group[dataset].size == 0:
        raise DataError(f"{path}: molecule {group.name!r} has no {dataset!r}; found {_listed(group)}")
    value = group[dataset][0]
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


SOURCE = Source("spice", "SPICE HDF5, one group per molecule", read_spice, matches)
