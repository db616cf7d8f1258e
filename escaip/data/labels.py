"""Between :class:`ase.Atoms` and :class:`~escaip.data.AtomicData`: where labels are kept, and under which key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.errors import ConfigError, DataError
from escaip.units import Units

if TYPE_CHECKING:
    from ase import Atoms

    from escaip.data.atomic_data import AtomicData


IGNORE = "ignore"


@dataclass(frozen=True)
class LabelKeys:
    """Names under which a file keeps its labels, in ``atoms.info``, ``atoms.arrays`` or the attached calculator.

    A key that is named must be there. When none of ``energy, forces, stress, virial`` is named, whatever the
    attached calculator holds is taken.

    Attributes:
        energy: total energy.
        forces: ``(n, 3)``.
        stress: ``(3, 3)``, ``(9,)`` or Voigt ``(6,)``, positive in tension.
        virial: ``(3, 3)``, ``(9,)`` or Voigt ``(6,)``; ``stress = −virial / V``, in energy units.
        charge: total charge; default ``charge`` where present.
        spin: spin multiplicity; default ``spin_multiplicity`` or ``spin`` where present; ``ignore`` leaves it 1.
        group: molecule or material, the unit of splits; default the chemical formula.
        structure_id: unique name; default file name and index.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    charge: str | None = None
    spin: str | None = None
    group: str | None = None
    structure_id: str | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, str | None] | LabelKeys | None) -> LabelKeys | None:
        """Reads a mapping from a configuration.

        Raises:
            ConfigError: an unknown name, or both ``stress`` and ``virial``.
        """
        if spec is None or isinstance(spec, LabelKeys):
            return spec
        known = [field.name for field in fields(cls)]
        for key in spec:
            if key not in known:
                raise ConfigError(f"keys: unknown label {key!r}; use one of {', '.join(known)}")
        keys = cls(**dict(spec))
        if keys.stress and keys.virial:
            raise ConfigError("keys: name stress or virial, not both")
        return keys

    @property
    def names_labels(self) -> bool:
        """Whether any label, and not only charge, group or the like, is named."""
        return any((self.energy, self.forces, self.stress, self.virial))


def structure_from_ase(
    cls: type[AtomicData],
    atoms: Atoms,
    *,
    keys: LabelKeys | None,
    structure_id: str | None,
    group: str | None,
    units: Units,
) -> AtomicData:
    """See :meth:`escaip.data.AtomicData.from_ase`."""
    keys = keys or LabelKeys()
    results = _held_results(atoms)
    name = structure_id or (_text(atoms, keys.structure_id) if keys.structure_id else "") or _formula(atoms)
    if keys.names_labels:
        energy = _find(atoms, results, keys.energy, "energy", name)
        forces = _find(atoms, results, keys.forces, "forces", name)
        stress = _find(atoms, results, keys.stress, "stress", name)
        if keys.virial:
            stress = _stress_from_virial(atoms, _find(atoms, results, keys.virial, "virial", name), units, name)
    else:
        energy, forces, stress = (results.get(key) for key in ("energy", "forces", "stress"))
    charge = _find(atoms, results, keys.charge, "charge", name) if keys.charge else atoms.info.get("charge", 0)
    spin: Any = 1
    if keys.spin and keys.spin != IGNORE:
        spin = _find(atoms, results, keys.spin, "spin", name)
    elif not keys.spin:
        spin = atoms.info.get("spin_multiplicity", atoms.info.get("spin", 1))
    if group is None:
        group = _text(atoms, keys.group) if keys.group else _formula(atoms)
    return cls.from_arrays(
        atoms.numbers,
        atoms.positions,
        cell=np.asarray(atoms.cell),
        pbc=atoms.pbc,
        energy=energy,
        forces=forces,
        stress=stress,
        charge=charge,
        spin_multiplicity=spin,
        fixed=_fixed_atoms(atoms),
        tags=atoms.arrays.get("tags"),
        magnetic_moments=results.get("magmoms"),
        structure_id=name,
        group=group,
        units=units,
    )


def structure_to_ase(data: AtomicData) -> Atoms:
    """See :meth:`escaip.data.AtomicData.to_ase`."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    atoms = Atoms(
        numbers=data.atomic_numbers.numpy(),
        positions=data.positions.numpy(),
        cell=data.cell[0].numpy(),
        pbc=data.pbc[0].numpy(),
    )
    if bool(data.tags.any()):
        atoms.set_tags(data.tags.numpy())
    if bool(data.fixed.any()):
        atoms.set_constraint(FixAtoms(mask=data.fixed.numpy()))
    if int(data.charge) != 0:
        atoms.info["charge"] = int(data.charge)
    if int(data.spin_multiplicity) != 1:
        atoms.info["spin_multiplicity"] = int(data.spin_multiplicity)
    atoms.info["structure_id"] = data.structure_id
    atoms.info["group"] = data.group
    results: dict[str, Any] = {}
    if data.has_label("energy"):
        results["energy"] = float(data.energy)
    if data.has_label("forces"):
        results["forces"] = data.forces.numpy().copy()
    if data.has_label("stress"):
        results["stress"] = data.stress[0].numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    if "magnetic_moments" in data:
        results["magmoms"] = data.magnetic_moments.numpy().copy()
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def labels_found(atoms: Atoms) -> str:
    """The keys a user can name, for messages."""
    results = _held_results(atoms)
    arrays = [key for key in atoms.arrays if key not in ("numbers", "positions")]
    parts = [
        f"info: {', '.join(sorted(map(str, atoms.info))) or 'none'}",
        f"arrays: {', '.join(sorted(arrays)) or 'none'}",
        f"calculator: {', '.join(sorted(results)) or 'none'}",
    ]
    return "; ".join(parts)


def _held_results(atoms: Atoms) -> dict[str, Any]:
    """What an attached single-point calculator holds; nothing is ever computed."""
    from ase.calculators.singlepoint import SinglePointCalculator

    if not isinstance(atoms.calc, SinglePointCalculator):
        return {}
    return {key: value for key, value in atoms.calc.results.items() if value is not None}


def _find(atoms: Atoms, results: Mapping[str, Any], key: str | None, label: str, name: str) -> Any:
    if key is None:
        return None
    for place in (atoms.info, atoms.arrays, results):
        if key in place:
            return place[key]
    raise DataError(f"{name}: no {label} under the key {key!r}; found {labels_found(atoms)}; name one of these in keys")


def _text(atoms: Atoms, key: str | None) -> str:
    if key not in atoms.info:
        raise DataError(
            f"{_formula(atoms)}: no {key!r} in info; found {labels_found(atoms)}; name one of these in keys"
        )
    return str(atoms.info[key])


def _formula(atoms: Atoms) -> str:
    return hill_formula(atoms.numbers) if len(atoms) else "structure"


def hill_formula(numbers: np.ndarray) -> str:
    """Chemical formula, carbon and hydrogen first where there is carbon, else alphabetical: ``C2H6O``."""
    from ase.data import chemical_symbols

    found, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
    named = {
        chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"[{z}]": int(count)
        for z, count in zip(found.tolist(), counts, strict=True)
    }
    first = [symbol for symbol in ("C", "H") if symbol in named] if "C" in named else []
    order = first + sorted(symbol for symbol in named if symbol not in first)
    return "".join(symbol + (str(named[symbol]) if named[symbol] > 1 else "") for symbol in order)


def _fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Atoms that a constraint holds in all three directions."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        kind = type(constraint).__name__
        if kind == "FixAtoms" or (kind in ("FixCartesian", "FixScaled") and bool(np.all(constraint.mask))):
            fixed[constraint.index] = True
    return fixed


def _stress_from_virial(atoms: Atoms, virial: Any, units: Units, name: str) -> np.ndarray:
    """``−virial / V`` in the source's units (virial in energy units), expressed in its unit of stress."""
    volume = abs(float(np.linalg.det(np.asarray(atoms.cell))))
    if volume == 0.0:
        raise DataError(f"{name}: has a virial but no cell volume; drop the virial key or give a cell")
    scale = units.energy / (volume * units.length**3) / units.stress
    return -np.asarray(virial, dtype=np.float64) * scale
