from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from torch_geometric.data import Batch

from escaip.data import AtomicData, LabelKeys, collate, open_source
from escaip.data.structure import TENSOR_FIELDS, join_batches
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS, Target
from escaip.units import Units

SHAPES = {
    "positions": ((4, 3), torch.float64),
    "atomic_numbers": ((4,), torch.int64),
    "cell": ((1, 3, 3), torch.float64),
    "pbc": ((1, 3), torch.bool),
    "charge": ((1,), torch.int64),
    "spin_multiplicity": ((1,), torch.int64),
    "energy": ((1,), torch.float64),
    "forces": ((4, 3), torch.float64),
    "stress": ((1, 3, 3), torch.float64),
    "fixed": ((4,), torch.bool),
    "tags": ((4,), torch.int64),
}


def crystal() -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True)
    rng = np.random.default_rng(0)
    atoms.positions += rng.normal(scale=0.05, size=(4, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=rng.normal(size=(4, 3)), stress=np.arange(6.0) * 1e-3)
    return atoms


@pytest.mark.parametrize("atoms", [crystal(), ase.build.molecule("NH3")], ids=["labelled", "bare"])
def test_every_field_has_its_shape_and_dtype_and_missing_labels_are_nan(atoms: Atoms) -> None:
    data = AtomicData.from_ase(atoms)
    assert data.num_nodes == 4
    for key, (shape, dtype) in SHAPES.items():
        assert tuple(data[key].shape) == shape, key
        assert data[key].dtype == dtype, key
    assert data.structure_id
    assert data.group
    for label in ("energy", "forces", "stress"):
        assert data.has_label(label) == (atoms.calc is not None)
        assert bool(torch.isnan(data[label]).all()) == (atoms.calc is None)


def test_from_ase_and_back_keep_everything() -> None:
    atoms = crystal()
    atoms.info.update(charge=-1, spin_multiplicity=2)
    atoms.set_tags([0, 1, 2, 0])
    atoms.set_constraint(FixAtoms([0, 2]))
    before = pickle.dumps((atoms.arrays, atoms.info, atoms.calc.results))
    data = AtomicData.from_ase(atoms)
    assert pickle.dumps((atoms.arrays, atoms.info, atoms.calc.results)) == before
    assert data.fixed.tolist() == [True, False, True, False]
    assert data.tags.tolist() == [0, 1, 2, 0]
    assert (int(data.charge), int(data.spin_multiplicity)) == (-1, 2)
    again = data.to_ase()
    assert np.array_equal(again.positions, atoms.positions)
    assert np.array_equal(again.get_forces(apply_constraint=False), atoms.get_forces(apply_constraint=False))
    assert np.array_equal(again.get_stress(), atoms.get_stress())
    round_trip = AtomicData.from_ase(again)
    for key in TENSOR_FIELDS:
        assert torch.equal(round_trip[key], data[key]), key
    data.positions += 1.0  # nothing is shared
    data.forces += 1.0
    assert pickle.dumps((atoms.arrays, atoms.info, atoms.calc.results)) == before


def test_only_full_constraints_fix_an_atom() -> None:
    atoms = crystal()
    atoms.set_constraint([FixCartesian(1, mask=(True, True, True)), FixCartesian(2, mask=(True, False, True))])
    assert AtomicData.from_ase(atoms).fixed.tolist() == [False, True, False, False]


def test_a_live_calculator_is_not_run() -> None:
    atoms = ase.build.bulk("Cu")
    atoms.calc = EMT()
    assert not AtomicData.from_ase(atoms).has_label("energy")


@pytest.mark.parametrize(
    "given",
    [
        np.arange(6.0),
        np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2.0]]),
        np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2.0]]).reshape(9),
    ],
)
def test_stress_forms_agree(given: np.ndarray) -> None:
    data = AtomicData.from_arrays([29], [[0, 0, 0]], cell=np.eye(3) * 3, pbc=True, stress=given)
    assert data.stress[0].tolist() == [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


def test_stress_from_virial() -> None:
    atoms = ase.build.bulk("Cu")
    atoms.info["virial"] = np.diag([1.0, 2.0, 3.0])
    data = AtomicData.from_ase(atoms, keys=LabelKeys.parse({"virial": "virial"}))
    assert data.stress[0].diagonal().tolist() == pytest.approx((-np.array([1, 2, 3]) / atoms.get_volume()).tolist())
    units = Units.parse({"energy": "meV", "length": "bohr"})
    converted = AtomicData.from_ase(atoms, keys=LabelKeys.parse({"virial": "virial"}), units=units)
    volume = atoms.get_volume() * units.length**3
    assert float(converted.stress[0, 2, 2]) == pytest.approx(-3e-3 / volume, rel=1e-12)


def test_a_molecule_in_a_box_has_no_stress() -> None:
    data = AtomicData.from_arrays([1], [[0, 0, 0]], cell=np.eye(3) * 9, pbc=False, stress=np.zeros(6))
    assert not data.has_label("stress")


def test_units_convert_positions_cell_and_labels() -> None:
    units = Units.parse({"length": "bohr", "energy": "hartree"})
    data = AtomicData.from_arrays(
        [1], [[1, 0, 0]], cell=np.eye(3) * 4, pbc=True, energy=1.0, forces=[[1, 0, 0]], stress=np.eye(3), units=units
    )
    assert float(data.positions[0, 0]) == units.length
    assert float(data.cell[0, 1, 1]) == 4 * units.length
    assert float(data.energy) == units.energy
    assert float(data.forces[0, 0]) == units.forces
    assert float(data.stress[0, 0, 0]) == units.stress


def with_edges(data: AtomicData) -> AtomicData:
    data.edge_index = torch.tensor([[0, 1, 0], [1, 0, 0]])
    data.edge_shift = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    data.edge_cutoff = torch.tensor([5.0], dtype=torch.float64)
    return data


@pytest.mark.parametrize("edges", [False, True])
def test_collate_equals_pyg(edges: bool) -> None:
    structures = [AtomicData.from_ase(atoms) for atoms in (ase.build.molecule("H2O"), crystal(), crystal())]
    if edges:
        structures = [with_edges(data) for data in structures]
    ours, theirs = collate(structures), Batch.from_data_list(structures)
    assert set(ours.keys()) == set(theirs.keys())
    assert ours.num_graphs == theirs.num_graphs == 3
    assert ours.num_nodes == theirs.num_nodes == 11
    for key in theirs.keys():  # noqa: SIM118
        mine, other = ours[key], theirs[key]
        if isinstance(other, torch.Tensor):
            assert torch.equal(mine.nan_to_num(-9.0), other.nan_to_num(-9.0)), key
            assert mine.dtype == other.dtype
        else:
            assert mine == other, key
    for mine, other in zip(ours.to_data_list(), structures, strict=True):
        assert mine.num_nodes == other.num_nodes
        for key in other.keys():  # noqa: SIM118
            if isinstance(other[key], torch.Tensor):
                assert torch.equal(mine[key].nan_to_num(-9.0), other[key].nan_to_num(-9.0)), key
    assert torch.equal(pickle.loads(pickle.dumps(ours)).positions, ours.positions)  # between processes


def test_collate_leaves_its_input_alone() -> None:
    data = with_edges(AtomicData.from_ase(crystal()))
    before = {key: data[key].clone() for key in (*TENSOR_FIELDS, "edge_index")}
    batch = collate([data, data])
    batch.positions += 1.0
    batch.edge_index += 1
    single = collate([data])
    single.positions += 1.0
    for key, value in before.items():
        assert torch.equal(data[key], value), key


def test_import_does_not_bring_lightning() -> None:
    code = "import sys; from escaip.data import AtomicData, collate; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def build(**changes: object) -> AtomicData:
    fields: dict = {"atomic_numbers": [6, 8], "positions": [[0, 0, 0], [0, 0, 1.1]], "structure_id": "file:7"}
    return AtomicData.from_arrays(**{**fields, **changes})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [[0, 0, 0], [0, 0, np.nan]]}, "atom 1 are NaN"),
        ({"positions": [[0, 0, 0], [0, 0, np.inf]]}, "atom 1 are NaN or infinite"),
        ({"positions": [[0, 0, 0], [0, 0, 0.05]]}, "atoms 0 and 1 are 0.05 Å apart"),
        ({"positions": [[0, 0, 0], [0, 0, 4.95]], "cell": np.eye(3) * 5, "pbc": True}, "atoms 0 and 1 are 0.05 Å"),
        ({"pbc": True}, "span no volume"),
        ({"cell": [[5, 0, 0], [5, 0, 0], [0, 0, 5]], "pbc": (True, True, False)}, "span no volume"),
        ({"cell": np.diag([5, 5, 0.01]), "pbc": True}, "planes are 0.01 Å apart"),
        ({"cell": np.full((3, 3), np.nan)}, "cell holds NaN"),
        ({"atomic_numbers": [6, 0]}, "atomic number 0"),
        ({"atomic_numbers": [6, 119]}, "atomic number 119"),
        ({"atomic_numbers": [], "positions": np.zeros((0, 3))}, "no atoms"),
        ({"positions": [[0, 0, 0]]}, r"positions have shape \(1, 3\)"),
        ({"energy": np.nan}, "energy holds NaN"),
        ({"forces": [[0, 0, 0], [0, np.inf, 0]]}, "forces holds NaN or Inf"),
        ({"forces": [[0, 0, 0]]}, "forces has shape"),
        ({"stress": np.zeros(5)}, "stress has shape"),
        ({"stress": np.arange(9.0)}, "not symmetric"),
        ({"charge": 0.5}, "charge is 0.5"),
        ({"charge": "high"}, "charge is 'high'"),
        ({"forces": [["a", "b", "c"]] * 2}, "forces holds something else than numbers"),
        ({"tags": [1]}, "tags has shape"),
    ],
)
def test_structures_that_mean_nothing_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"^file:7: .*{message}"):
        build(**changes)


@pytest.mark.parametrize("pbc", [(True, False, False), (True, True, False), (False, True, True), (True, True, True)])
def test_overlap_is_found_through_skewed_cells(pbc: tuple[bool, bool, bool]) -> None:
    """Brute force over images, on random cells, wrapped or not."""
    rng = np.random.default_rng(5)
    caught = 0
    for trial in range(60):
        cell = np.diag([3.0, 4.0, 5.0]) + rng.normal(scale=1.0, size=(3, 3))
        positions = rng.normal(scale=4.0, size=(6, 3))
        if trial % 2:
            shift = np.where(pbc, rng.integers(-2, 3, size=3), 0)
            positions[5] = positions[2] + shift @ cell + rng.normal(scale=0.05, size=3)
        shifts = np.array(np.meshgrid(*[range(-9, 10) if flag else [0] for flag in pbc])).reshape(3, -1).T @ cell
        delta = positions[:, None, None] - positions[None, :, None] + shifts
        distance = np.linalg.norm(delta, axis=-1)
        distance[np.arange(6), np.arange(6), np.argmin(np.abs(shifts).sum(1))] = np.inf
        expected = bool(distance.min() < 0.1)
        try:
            AtomicData.from_arrays([1] * 6, positions, cell=cell, pbc=pbc)
            found = False
        except DataError:
            found = True
        assert found == expected, (trial, distance.min())
        caught += expected
    assert 5 < caught < 55


def test_slabs_may_lack_the_third_vector() -> None:
    AtomicData.from_arrays([6], [[0, 0, 0]], cell=np.diag([3.0, 3.0, 0.0]), pbc=(True, True, False))


@pytest.mark.bad_input
def test_bad_batches_and_keys() -> None:
    with pytest.raises(DataError, match="has no neighbor list"):
        collate([with_edges(AtomicData.from_ase(crystal())), AtomicData.from_ase(crystal())])
    with pytest.raises(DataError, match="no structures"):
        collate([])
    atoms = crystal()
    atoms.info["dft_energy"] = -1.0
    with pytest.raises(DataError, match=r"REF_energy.*info: dft_energy; arrays: none; calculator: energy, forces"):
        AtomicData.from_ase(atoms, keys={"energy": "REF_energy"})
    with pytest.raises(ConfigError, match="unknown label 'energie'"):
        LabelKeys.parse({"energie": "E"})


@pytest.fixture
def dipole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two further targets, one that ASE knows and one for each atom that it does not."""
    monkeypatch.setitem(TARGETS, "dipole", Target("dipole", False, (3,), "e·Å", "me·Å", 1e3))
    monkeypatch.setitem(TARGETS, "quadrupoles", Target("quadrupoles", True, (3, 3), "e·Å²", "e·Å²"))


@pytest.mark.usefixtures("dipole")
@pytest.mark.parametrize("key", ["REF_dipole", "dipole"])
def test_a_further_target_is_read_written_and_batched(key: str, tmp_path: Path) -> None:
    atoms, bare = crystal(), ase.build.molecule("H2O")
    atoms.info[key] = [1.0, 2.0, 3.0]
    atoms.arrays["quadrupoles"] = np.arange(36.0).reshape(4, 3, 3)
    data = AtomicData.from_ase(atoms, keys={"dipole": key})
    assert data.dipole.tolist() == [[1.0, 2.0, 3.0]]
    assert data.has_label("energy")  # naming a further target leaves the others where they are
    assert AtomicData.from_ase(atoms).has_label("dipole") == (key == "dipole")
    ase.io.write(tmp_path / "one.extxyz", data.to_ase())
    for again in (AtomicData.from_ase(data.to_ase()), next(open_source(tmp_path / "one.extxyz"))):
        assert torch.equal(again.dipole, data.dipole)
        assert torch.equal(again.quadrupoles, data.quadrupoles)
    batch = collate([data, AtomicData.from_ase(bare)])
    assert batch.dipole[0].tolist() == [1.0, 2.0, 3.0]
    assert bool(batch.dipole[1].isnan().all())
    assert (batch.dipole.shape, batch.quadrupoles.shape) == ((2, 3), (7, 3, 3))
    assert torch.equal(join_batches([batch, batch]).quadrupoles[7:11], data.quadrupoles)
    assert torch.equal(batch.to_data_list()[0].quadrupoles, data.quadrupoles)


def test_a_structure_from_before_a_target_was_registered_lacks_it(request: pytest.FixtureRequest) -> None:
    data = AtomicData.from_ase(crystal())
    request.getfixturevalue("dipole")
    batch = collate([data, AtomicData.from_arrays([1], [[0, 0, 0]], labels={"dipole": [1, 2, 3]})])
    assert bool(batch.dipole[0].isnan().all())
    assert not data.has_label("dipole")
    assert batch.dipole[1].tolist() == [1, 2, 3]


@pytest.mark.bad_input
@pytest.mark.usefixtures("dipole")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"dipole": [1, 2]}, r"dipole has shape \(2,\), expected \(3,\)"),
        ({"dipole": [1, 2, np.nan]}, "dipole holds NaN"),
        ({"quadrupoles": np.zeros((1, 3, 3))}, "quadrupoles has shape"),
        ({"charges": [1.0]}, "'charges' is no target"),
    ],
)
def test_a_bad_further_label_is_refused(labels: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(labels=labels)
