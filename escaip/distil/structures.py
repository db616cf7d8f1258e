"""Structures to label: bases by prototype, SMILES, dimer or file, and variations of them."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers, chemical_symbols, covalent_radii
from ase.neighborlist import neighbor_list
from numpy.random import Generator
from numpy.typing import NDArray

from escaip.distil.plan import Base, Variation
from escaip.errors import ConfigError
from escaip.simulate.output import read_structures

_VACUUM, _SLAB = 12.0, 8.0  # Å
_GAP = 1.6  # Å between two molecules that are packed, at least
_AMU_PER_A3 = 1.66053907  # in g/cm³
_TRIES = 200  # of a random place


@dataclass(frozen=True)
class Structure:
    """A structure to label, or to begin a run at.

    Attributes:
        name: entry of the plan, and number or kind.
        group: what is held out together: the base; of molecules, their scaffold.
        atoms: with ``info["charge"]`` and ``info["spin"]`` where they are not 0 and 1.
    """

    name: str
    group: str
    atoms: Atoms


def generator(seed: int, *names: Any) -> Generator:
    """Returns the random numbers of one thing, whatever else is made."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


def make_bases(name: str, base: Base, seed: int) -> list[Structure]:
    """Makes the structures of a base, in an order that does not depend on the seed.

    Args:
        name: of the entry in the plan.
        base: the entry.
        seed: of conformers, and of what is drawn where ``count`` says so.

    Raises:
        ConfigError: an unknown prototype, element or SMILES, or a package that is not installed.
        DataError: the file cannot be read.
    """
    makers: dict[str, Callable[[], Iterator[tuple[str, str, Atoms]]]] = {
        "prototypes": lambda: _crystals(base),
        "smiles": lambda: _molecules(base, seed),
        "dimers": lambda: _dimers(base),
        "file": lambda: _read(base),
    }
    kind = next(kind for kind in makers if getattr(base, kind))
    try:
        made = [Structure(f"{name}/{label}", group, atoms) for label, group, atoms in makers[kind]()]
    except ConfigError as error:
        raise ConfigError(f"bases.{name}: {error}") from error
    if not base.count or base.count >= len(made) or base.smiles:  # molecules are drawn before they are embedded
        return made
    chosen = generator(seed, name).choice(len(made), base.count, replace=False)
    return [made[index] for index in sorted(chosen.tolist())]


def make_variations(
    name: str, variation: Variation, bases: Mapping[str, Sequence[Structure]], seed: int
) -> list[Structure]:
    """Makes the structures of a variation; each depends on the seed and on its own number alone.

    Args:
        name: of the entry in the plan.
        variation: the entry.
        bases: structures by the name of the base.
        seed: of all that is random.

    Raises:
        ConfigError: a change that this kind of base cannot have.
    """
    held = [one for base in variation.of for one in bases[base]]
    if not held:
        raise ConfigError(f"{name}: bases {', '.join(variation.of)} have no structure left: see the failures of labels")
    order = generator(seed, name, "order").permutation(len(held))
    others = [one.atoms for base in variation.among for one in bases[base]]
    made = []
    for number in range(variation.count):
        origin = held[order[number % len(held)]]
        try:
            atoms = vary(origin.atoms, variation, generator(seed, name, number), others)
        except ConfigError as error:
            raise ConfigError(f"{name}: {origin.name}: {error}") from error
        made.append(Structure(f"{name}/{number:05d}", origin.group, atoms))
    return made


def vary(atoms: Atoms, variation: Variation, rng: Generator, others: Sequence[Atoms] = ()) -> Atoms:
    """Returns a copy with the changes of a variation, in the order of its attributes.

    Args:
        atoms: a crystal or a molecule.
        variation: the changes.
        rng: random numbers.
        others: molecules of the bases that ``among`` names.

    Raises:
        ConfigError: a change that a crystal, or a molecule, cannot have.
    """
    made = _plain(atoms)
    crystal = bool(made.pbc.any())
    wanted = [name for name in ("atoms", "mix", "surface", "cluster", "vacancies", "swaps") if getattr(variation, name)]
    if wanted and not crystal:
        raise ConfigError(f"{wanted[0]} is for crystals, and this is a molecule")
    if crystal and (variation.copies > 1 or variation.stretch):
        raise ConfigError("copies and stretch are for molecules, and this is a crystal")
    if crystal and variation.surface:
        made = _slab(made, variation, rng)
    elif crystal and variation.atoms:
        made = _grown(made, 4 * variation.atoms if variation.cluster else variation.atoms, axes=(0, 1, 2))
    if variation.mix:
        _mix(made, [_number(symbol) for symbol in variation.mix], rng)
    if variation.cluster:
        made = _cluster(made, variation.atoms, rng)
    if variation.vacancies >= len(made):
        raise ConfigError(f"{variation.vacancies} vacancies in a cell of {len(made)} atoms: set atoms")
    del made[sorted(rng.choice(len(made), variation.vacancies, replace=False).tolist())]
    for _ in range(variation.interstitials):
        made += Atoms([int(rng.choice(made.numbers))], [_room(made, rng)])
    for _ in range(variation.swaps):
        _swap(made, rng)
    if variation.copies > 1:
        drawn = [(others or [made])[int(rng.integers(len(others) or 1))] for _ in range(variation.copies - 1)]
        made = _packed([made, *drawn], variation.density, rng)
    if variation.strain:
        if not made.pbc.any():
            raise ConfigError("strain is for what is periodic: leave it out")
        made.set_cell(made.cell.array @ _deformation(variation.strain, rng), scale_atoms=True)
    if variation.stretch:
        _stretch(made, float(rng.uniform(variation.stretch[0], variation.stretch[1])), rng)
    made.positions += rng.normal(scale=rng.uniform(0, variation.rattle), size=made.positions.shape)
    return made


def bonds(atoms: Atoms) -> list[tuple[int, int]]:
    """Returns pairs of a molecule that are nearer than 1.25 times the sum of their covalent radii."""
    first, second = np.triu_indices(len(atoms), 1)
    reach = 1.25 * (covalent_radii[atoms.numbers[first]] + covalent_radii[atoms.numbers[second]])
    near = np.linalg.norm(atoms.positions[first] - atoms.positions[second], axis=1) < reach
    return list(zip(first[near].tolist(), second[near].tolist(), strict=True))


def side_of(pairs: Sequence[tuple[int, int]], start: int, barred: int) -> list[int]:
    """Returns atoms that hang on ``start`` without its bond to ``barred``, which is among them in a ring."""
    seen, queue = {start}, [start]
    while queue:
        one = queue.pop()
        for pair in pairs:
            other = sum(pair) - one
            if one in pair and other not in seen and {one, other} != {start, barred}:
                seen.add(other)
                queue.append(other)
    return sorted(seen)


def _plain(atoms: Atoms) -> Atoms:
    info = {name: atoms.info[name] for name in ("charge", "spin") if name in atoms.info}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)


def _number(symbol: str) -> int:
    if symbol not in atomic_numbers or symbol == "X":
        raise ConfigError(f"{symbol!r} is no element")
    return int(atomic_numbers[symbol])


def _crystals(base: Base) -> Iterator[tuple[str, str, Atoms]]:
    """Yields prototypes with the elements or formulas, scaled so that the nearest two atoms touch."""
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Composition
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    library = {entry["tags"]["strukturbericht"]: entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY}
    matcher, fitting = StructureMatcher(), set[str]()
    for symbol in base.elements:
        _number(symbol)
    for prototype in base.prototypes:
        if prototype not in library:
            raise ConfigError(f"prototype {prototype!r} is not in AFLOW's library: Strukturbericht symbols, such as A1")
        structure = SpacegroupAnalyzer(library[prototype]).get_conventional_standard_structure()
        kinds = list(structure.composition)
        if base.elements:
            choices = list(itertools.permutations(base.elements, len(kinds)))
        else:
            formulas = [Composition(formula) for formula in base.formulas]
            own = structure.composition.anonymized_formula
            fitting |= {f.reduced_formula for f in formulas if f.anonymized_formula == own}
            choices = [
                tuple(one.symbol for one in order)
                for formula in formulas if formula.anonymized_formula == own
                for order in itertools.permutations(formula) if _fits(structure.composition, kinds, formula, order)
            ]  # fmt: skip
        kept: dict[str, list[Any]] = {}
        for choice in choices:
            made = structure.copy()
            made.replace_species(dict(zip(kinds, choice, strict=True)))
            same = kept.setdefault(made.composition.reduced_formula, [])
            if any(matcher.fit(made, other) for other in same):  # the order of equivalent sites makes no difference
                continue
            label = f"{prototype}-{made.composition.reduced_formula}" + (f"-{len(same) + 1}" if same else "")
            same.append(made)
            yield label, label, _touching(made.to_ase_atoms())
    if lost := [formula for formula in base.formulas if Composition(formula).reduced_formula not in fitting]:
        raise ConfigError(
            f"none of the prototypes has the stoichiometry of {', '.join(lost)}: add one, or leave them out"
        )


def _fits(own: Any, kinds: Sequence[Any], formula: Any, order: Sequence[Any]) -> bool:
    factor = own.num_atoms / formula.num_atoms
    return all(math.isclose(own[a], factor * formula[b]) for a, b in zip(kinds, order, strict=True))


def _touching(atoms: Any) -> Atoms:
    """Returns a crystal scaled so that the nearest two atoms are as far apart as their covalent radii say."""
    made = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    made.set_cell(made.cell / _tightness(made), scale_atoms=True)
    return made


def _tightness(atoms: Atoms) -> float:
    """Returns the smallest distance in units of the sum of covalent radii."""
    reach = 3.0
    while True:
        first, second, distance = neighbor_list("ijd", atoms, reach)
        if len(first):
            radii = covalent_radii[atoms.numbers]
            return float((distance / (radii[first] + radii[second])).min())
        reach *= 2


def _all_smiles(base: Base) -> list[str]:
    """Returns the SMILES with every choice of groups in their places."""
    found = []
    for template in base.smiles:
        pieces = re.split(r"\{(\w+)\}", template)  # between places, and their names
        if unknown := [name for name in pieces[1::2] if name not in base.groups]:
            raise ConfigError(f"{template!r}: groups has no {unknown[0]!r}")
        for choice in itertools.product(*(base.groups[name] for name in pieces[1::2])):
            pieces[1::2] = choice
            found.append("".join(pieces))
    if unused := [name for name in base.groups if not any(f"{{{name}}}" in template for template in base.smiles)]:
        raise ConfigError(f"groups.{unused[0]} is in no SMILES")
    return found


def _molecules(base: Base, seed: int) -> Iterator[tuple[str, str, Atoms]]:
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
        from rdkit.Chem.Scaffolds import MurckoScaffold
    except ImportError as error:
        raise ConfigError("smiles need RDKit: pip install 'escaip[distil]'") from error
    quiet = rdBase.BlockLogs()
    candidates = _all_smiles(base)
    if base.count and base.count < len(candidates):
        chosen = generator(seed, *base.smiles).choice(len(candidates), base.count, replace=False)
        candidates = [candidates[index] for index in sorted(chosen.tolist())]
    seen = set[str]()
    for smiles in candidates:
        parsed = Chem.MolFromSmiles(smiles)
        if parsed is None:
            raise ConfigError(f"{smiles!r} is no SMILES")
        if (canonical := Chem.MolToSmiles(parsed)) in seen:
            continue
        seen.add(canonical)
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=parsed) or canonical
        molecule, options = Chem.AddHs(parsed), rdDistGeom.ETKDGv3()
        options.randomSeed = (seed + 1) & 0x7FFFFFFF  # type: ignore[assignment]
        numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
        found = [int(index) for index in rdDistGeom.EmbedMultipleConfs(molecule, base.conformers, options)]
        if not found:
            raise ConfigError(f"{smiles}: RDKit finds no conformer")
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule, maxIters=500)
        own = Chem.GetFormalCharge(molecule)
        for charge in dict.fromkeys((own, *base.charges)):
            unpaired = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()) if charge == own else 0
            spin = unpaired + 1 if unpaired else 1 + (sum(numbers) - charge) % 2
            info = ({"charge": charge} if charge else {}) | ({"spin": spin} if spin != 1 else {})
            for index in found:
                label = f"{smiles}{f' {charge:+d}' if charge != own else ''} {index}"
                yield label, scaffold, Atoms(numbers, molecule.GetConformer(index).GetPositions(), info=info)
    del quiet


def _dimers(base: Base) -> Iterator[tuple[str, str, Atoms]]:
    for one, other in itertools.combinations_with_replacement([_number(symbol) for symbol in base.dimers], 2):
        label = f"{chemical_symbols[one]}-{chemical_symbols[other]}"
        contact = covalent_radii[one] + covalent_radii[other]
        # As many electrons as spins allow are paired: what a closed-shell method can do.
        info = {"spin": 2} if (one + other) % 2 else {}
        for number, distance in enumerate(np.geomspace(0.6 * contact, base.reach, base.points)):
            yield f"{label} {number}", label, Atoms([one, other], [[0, 0, 0], [distance, 0, 0]], info=info)


def _read(base: Base) -> Iterator[tuple[str, str, Atoms]]:
    for number, atoms in enumerate(read_structures(base.file)):
        yield f"{number}", f"{atoms.get_chemical_formula()} {number}", _plain(atoms)


def _grown(atoms: Atoms, most: int, axes: Sequence[int]) -> Atoms:
    """Repeats the shortest axis, again and again, as long as there are at most so many atoms."""
    repeats = [1, 1, 1]
    while True:
        lengths = {axis: repeats[axis] * atoms.cell.lengths()[axis] for axis in axes}
        axis = min(lengths, key=lambda one: lengths[one])
        if len(atoms) * math.prod(repeats) // repeats[axis] * (repeats[axis] + 1) > most:
            return atoms.repeat(repeats)
        repeats[axis] += 1


def _slab(atoms: Atoms, variation: Variation, rng: Generator) -> Atoms:
    from pymatgen.core.surface import SlabGenerator, get_symmetrically_distinct_miller_indices
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(atoms)
    planes = get_symmetrically_distinct_miller_indices(structure, variation.surface)
    plane = planes[int(rng.integers(len(planes)))]
    slabs = SlabGenerator(structure, plane, _SLAB, _VACUUM, center_slab=True, lll_reduce=True).get_slabs()
    made = slabs[int(rng.integers(len(slabs)))].to_ase_atoms()
    return _grown(Atoms(made.numbers, made.positions, cell=made.cell, pbc=True), max(variation.atoms, 1), axes=(0, 1))


def _mix(atoms: Atoms, numbers: Sequence[int], rng: Generator) -> None:
    before = covalent_radii[atoms.numbers].mean()
    atoms.numbers = rng.choice(numbers, len(atoms))
    atoms.set_cell(atoms.cell * (covalent_radii[atoms.numbers].mean() / before), scale_atoms=True)


def _cluster(atoms: Atoms, count: int, rng: Generator) -> Atoms:
    center = atoms.cell.cartesian_positions(np.full(3, 0.5)) + rng.uniform(-1, 1, 3)
    nearest = np.argsort(np.linalg.norm(atoms.positions - center, axis=1), kind="stable")[:count]
    return Atoms(atoms.numbers[nearest], atoms.positions[nearest] - center)


def _room(atoms: Atoms, rng: Generator) -> NDArray[np.float64]:
    """Returns the emptiest of some random places in the cell, or on the surface of a molecule."""
    from ase.geometry import get_distances

    if atoms.pbc.any():
        places = rng.random((_TRIES, 3)) @ atoms.cell.array
    else:
        steps = rng.normal(size=(_TRIES, 3))
        steps *= 2.5 / np.linalg.norm(steps, axis=1, keepdims=True)
        places = atoms.positions[rng.integers(len(atoms), size=_TRIES)] + steps
    nearest = get_distances(places, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)[1].min(axis=1)
    # Beside a surface the emptiest place of all is far out in the vacuum, where nothing is felt.
    found: NDArray[np.float64] = places[int(np.argmax(np.where(nearest < 2.8, nearest, -nearest)))]
    return found


def _swap(atoms: Atoms, rng: Generator) -> None:
    one = int(rng.integers(len(atoms)))
    others = np.flatnonzero(atoms.numbers != atoms.numbers[one])
    if not len(others):
        raise ConfigError("swaps need two elements")
    other = int(rng.choice(others))
    atoms.numbers[[one, other]] = atoms.numbers[[other, one]]


def _deformation(strain: float, rng: Generator) -> NDArray[np.float64]:
    if rng.random() < 0.5:
        return np.eye(3) * (1 + rng.uniform(-strain, strain))
    change = rng.uniform(-strain, strain, (3, 3))
    return np.eye(3) + (change + change.T) / 2


def _packed(molecules: Sequence[Atoms], density: float, rng: Generator) -> Atoms:
    """Puts molecules on a simple cubic lattice, the first in the middle, each turned until it touches no other."""
    copies = len(molecules)
    side = math.ceil(copies ** (1 / 3) - 1e-9)
    sites = np.array(list(itertools.product(range(side), repeat=3)))
    size = max(float(np.ptp(one.positions, axis=0).max()) for one in molecules)
    if density:
        mass = sum(float(atomic_masses[one.numbers].sum()) for one in molecules)
        edge = (mass * _AMU_PER_A3 / density) ** (1 / 3)
        sites = sites[np.sort(rng.choice(len(sites), copies, replace=False))]
        made, spacing = Atoms(cell=np.eye(3) * edge, pbc=True), edge / side
    else:
        middle = np.linalg.norm(sites - sites.mean(axis=0), axis=1)
        sites = sites[np.argsort(middle, kind="stable")[:copies]]
        made, spacing = Atoms(), size / 1.5 + 2.5
    for molecule, site in zip(molecules, sites, strict=True):
        made += _turned(molecule, (site + 0.5) * spacing, made, rng)
    charge = sum(int(one.info.get("charge", 0)) for one in molecules)
    spin = 1 + sum(int(one.info.get("spin", 1)) - 1 for one in molecules)
    made.info = ({"charge": charge} if charge else {}) | ({"spin": spin} if spin != 1 else {})
    return made


def _turned(molecule: Atoms, center: NDArray[np.float64], others: Atoms, rng: Generator) -> Atoms:
    """Returns a copy at a place, in the first random orientation without a contact, or the best of many."""
    from ase.geometry import get_distances
    from scipy.spatial.transform import Rotation

    best, widest = molecule, -1.0
    for _ in range(_TRIES):
        copy = Atoms(molecule.numbers, molecule.positions - molecule.positions.mean(axis=0))
        copy.positions = Rotation.random(random_state=rng).apply(copy.positions) + center
        if not len(others):
            return copy
        gap = float(get_distances(copy.positions, others.positions, cell=others.cell, pbc=others.pbc)[1].min())
        if gap > widest:
            best, widest = copy, gap
        if gap > _GAP:
            break
    return best


def _stretch(atoms: Atoms, factor: float, rng: Generator) -> None:
    pairs = bonds(atoms)
    rng.shuffle(pairs)
    for one, other in pairs:
        moved = side_of(pairs, other, one)
        if one not in moved:
            atoms.positions[moved] += (factor - 1) * (atoms.positions[other] - atoms.positions[one])
            return
