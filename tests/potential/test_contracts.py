"""The physics of a conservative EScAIP with random weights in float64, its repulsion and second derivatives."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.data import covalent_radii
from tiny import methanol

from escaip import EScAIPCalculator, load_potential
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.graph import build_graph
from escaip.info import describe_model
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.hessian import asymmetry, hessian
from escaip.potential.zbl import Distances, bond_gaps, fit_onsets, guard_onsets, measure_distances, zbl_onsets
from escaip.testing import check_potential, continuity_error, evaluator, rotation_errors

make_potential = partial(tiny.make_potential, num_layers=2)


def structures() -> list[Atoms]:
    molecule = ase.build.molecule("CH3CH2OH")
    primitive = ase.build.bulk("Cu", "fcc", a=3.6)  # one atom; the cell is much smaller than the cutoff
    slab = ase.build.fcc111("Al", (2, 2, 2), vacuum=5.0)
    slab.rattle(0.05, seed=2)
    skewed = Atoms("Si2", positions=[[0, 0, 0], [1.3, 1.2, 1.5]], cell=[[3, 0, 0], [2.5, 3, 0], [1, 1, 3.2]], pbc=True)
    rod = Atoms("C2", positions=[[0, 0, 0], [0.1, 1.3, 0.2]], cell=[[2.6, 0.4, 0], [0, 0, 0], [0, 0, 0]],
                pbc=[True, False, False])  # fmt: skip
    return [molecule, tiny.crystal(), primitive, slab, skewed, rod]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"angular_channels": None, "message_gate": True, "norm": "layernorm", "activation": "silu"},
        {"num_neighbors": None, "aggregation": "graph_attention"},
        {"rank_step": "bump", "attention_scale": "expanded", "charge": True, "spin": True},
        {"density_radial": 5, "density_degree": 3},
        {"angular_values": True, "node_density": 3, "node_density_degree": 2, "edge_ffn": False, "num_layers": 2},
        {"num_energy_heads": 3},
    ],
)
def test_contracts_hold_in_float64(overrides: dict[str, object]) -> None:
    check_potential(make_potential(**overrides), structures())


def test_direct_forces_are_not_equivariant_and_it_is_measured() -> None:
    """The published direct head; its energy is invariant all the same."""
    evaluate = evaluator(make_potential(forces="direct"))
    energy_error, force_error = rotation_errors(evaluate, structures()[0], np.random.default_rng(0))
    assert energy_error < 1e-10
    assert force_error > 1e-4


def one_atom_path(atoms: Atoms, index: int, step: float, count: int, start: float = 0.0) -> list[Atoms]:
    direction = np.array([0.6, 0.64, 0.48])
    path = []
    for number in range(count):
        moved = atoms.copy()
        moved.positions[index] += (start + number * step) * direction
        path.append(moved)
    return path


def token_sets(potential: Potential, path: list[Atoms]) -> list[set[tuple[int, ...]]]:
    sets = []
    for atoms in path:
        graph = build_graph(tiny.batch_of(atoms), potential.config.graph)
        rows = torch.cat(
            [graph.token_center[:, None], graph.token_neighbor[:, None], graph.shift[: graph.num_tokens]], 1
        )
        sets.append({tuple(row) for row in rows.tolist()})
    return sets


@pytest.fixture(scope="module")
def crossings() -> tuple[Atoms, list[float]]:
    """A crystal and the displacements of one atom at which its neighbor lists change."""
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 1))
    atoms.rattle(0.15, seed=4)
    path = one_atom_path(atoms, 3, 0.005, 60)
    sets = token_sets(make_potential(), path)
    changes = [number * 0.005 for number in range(len(path) - 1) if sets[number] != sets[number + 1]]
    assert len(changes) >= 3
    return atoms, changes


def test_energy_and_forces_are_continuous_where_neighbors_come_and_go(crossings: tuple[Atoms, list[float]]) -> None:
    atoms, changes = crossings
    potential = make_potential()
    for start in changes[:3]:
        # 500 steps of 1e-5 Å cover the 0.005 Å in which a token enters or leaves, in five pieces that overlap.
        path = one_atom_path(atoms, 3, 1e-5, 504, start - 1e-5)
        sets = token_sets(potential, path[::100])
        assert sets[0] != sets[-1]
        energy_jump, force_jump = continuity_error(evaluator(potential), path)
        assert energy_jump < 1e-7
        assert force_jump < 1e-7


def test_published_weights_make_the_energy_jump(crossings: tuple[Atoms, list[float]]) -> None:
    """What the smooth bond-orientational order repairs: the check above sees the published feature's jump."""
    atoms, changes = crossings
    path = one_atom_path(atoms, 3, 1e-5, 504, changes[0] - 1e-5)
    energy_jump, _ = continuity_error(evaluator(make_potential(boo_weighting="uniform")), path)
    assert energy_jump > 1e-6


def test_isolated_atoms_have_finite_energy_and_no_force() -> None:
    lone = Atoms("He", positions=[[3.0, 1.0, 2.0]])
    far = Atoms("HeNe", positions=[[0, 0, 0], [30.0, 0, 0]])
    alone, apart = evaluator(make_potential())([lone, far])
    assert np.isfinite(alone.energy)
    assert (alone.forces == 0).all()
    assert (apart.forces == 0).all()
    assert apart.energy == pytest.approx(
        alone.energy + evaluator(make_potential())([Atoms("Ne", positions=[[0, 0, 0]])])[0].energy, abs=1e-12
    )


def crystal() -> Atoms:
    """Two atoms in a cell smaller than the cutoff: every atom sees its own images."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    atoms.rattle(0.1, seed=1)
    return atoms


@pytest.mark.parametrize("make", [methanol, crystal])
@pytest.mark.parametrize("overrides", [{}, {"num_neighbors": None, "aggregation": "graph_attention"}])
def test_it_is_the_derivative_of_the_forces(make: object, overrides: dict[str, object]) -> None:
    potential, atoms = make_potential(**overrides), make()  # type: ignore[operator]
    found = potential.hessian(atoms, symmetrize=False)
    assert found.dtype == torch.float64
    assert found.shape == (3 * len(atoms), 3 * len(atoms))
    assert asymmetry(found) < 1e-10
    near = hessian(potential, atoms, method="finite_differences", step=1e-5)
    assert float((near - found).abs().max()) < 1e-7 * float(found.abs().max())


def test_a_rotation_turns_the_forces() -> None:
    """``H (e × r) = −e × F``: zero where the forces are."""
    potential, atoms = make_potential(), methanol()
    found = potential.hessian(atoms).numpy()
    forces = potential.predict([atoms])[0].forces.numpy()
    for axis in np.eye(3):
        change = found @ np.cross(axis, atoms.positions).ravel()
        np.testing.assert_allclose(change, -np.cross(axis, forces).ravel(), atol=1e-11)


def test_rows_do_not_depend_on_how_many_are_made_at_once() -> None:
    potential, atoms = make_potential(), methanol()
    whole = potential.hessian(atoms)
    for copies in (1, 5, 100):
        assert float((potential.hessian(atoms, copies=copies) - whole).abs().max()) < 1e-13
    potential.recompute = True
    assert float((potential.hessian(atoms, copies=4) - whole).abs().max()) < 1e-13


def test_structure_and_potential_stay_as_they_are() -> None:
    potential, atoms = make_potential(dropout=0.5).train(), methanol()
    data, before = AtomicData.from_ase(atoms), atoms.copy()
    found = potential.hessian(data)
    assert potential.training
    assert all(weight.requires_grad and weight.grad is None for weight in potential.parameters())
    assert not data.positions.requires_grad
    with torch.inference_mode():
        assert torch.equal(potential.eval().hessian(atoms), found)
    assert atoms == before


def test_float32_and_its_remedy() -> None:
    double = make_potential()
    single, exact = make_potential().float(), double.hessian(methanol())
    largest = float(exact.abs().max())
    found = single.hessian(methanol())
    assert found.dtype == torch.float64
    assert 1e-9 < float((found - exact).abs().max()) / largest < 2e-5
    # Weights are float32 values in both: what is left is the rounding of the weights themselves.
    assert float((single.hessian(methanol(), dtype=torch.float64) - exact).abs().max()) / largest < 2e-6
    assert single.dtype == torch.float32


def test_the_calculator_has_it_too() -> None:
    potential, atoms = make_potential(), methanol()
    calculator = EScAIPCalculator(potential)
    with pytest.raises(ConfigError, match=r"call get_hessian\(atoms\)"):
        calculator.get_hessian()
    found = calculator.get_hessian(atoms)
    np.testing.assert_allclose(found, potential.hessian(atoms).numpy(), atol=1e-13)
    atoms.calc = calculator
    atoms.get_potential_energy()
    np.testing.assert_array_equal(calculator.get_hessian(), found)


def test_atoms_that_see_no_other() -> None:
    apart = Atoms("H2", positions=[[0, 0, 0], [9, 0, 0]])
    assert float(make_potential().hessian(apart).abs().max()) == 0.0
    assert float(make_potential().hessian(Atoms("Cu", cell=[2.5] * 3, pbc=True)).abs().max()) < 1e-12


def test_direct_forces_are_refused_and_had_by_differences() -> None:
    potential = make_potential(forces="direct")
    with pytest.raises(ConfigError, match=r"Jacobian is not symmetric: .*method='finite_differences'"):
        potential.hessian(methanol())
    with pytest.warns(UserWarning, match=r"asymmetric by [\d.]+ %"):
        raw = potential.hessian(methanol(), method="finite_differences", symmetrize=False)
    assert asymmetry(raw) > 1e-3
    with pytest.warns(UserWarning, match="asymmetric"):
        assert asymmetry(potential.hessian(methanol(), method="finite_differences")) == 0.0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method is 'magic': choose autograd or finite_differences"),
        ({"step": 0.0}, "step is 0.0 Å"),
        ({"copies": 0}, "copies is 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_potential().hessian(methanol(), **options)


@pytest.mark.bad_input
def test_what_has_no_second_derivatives() -> None:
    with pytest.raises(UnsupportedElementError):
        make_potential(elements=(29,)).hessian(methanol())
    rounded = make_potential().float()
    rounded.precision = "bfloat16"
    with pytest.raises(ConfigError, match="do not survive precision 'bfloat16'"):
        rounded.hessian(methanol())
    with pytest.raises(DataError):
        make_potential().hessian(Atoms("H2", positions=[[0, 0, 0], [0, 0, np.nan]]))


TERMS = ("repulsion", "core_guard", "bond_guard")


def make_repulsive(onset: float | None, term: str = "repulsion", **overrides: object) -> Potential:
    potential = tiny.make_potential(**overrides)
    if onset is not None:
        getattr(potential, term).onset = torch.full((119, 119), onset)
        potential.bond_guard.start = torch.full((119, 119), 0.4 * onset)
    return potential


def published(first: int, second: int, r: float) -> float:
    """Of Ziegler, Biersack and Littmark, with constants from its reference implementation in atomic units."""
    a = 0.8854 * 0.529177 / (first**0.23 + second**0.23)
    phi = 0.18175 * math.exp(-3.1998 * r / a) + 0.50986 * math.exp(-0.94229 * r / a)
    phi += 0.28022 * math.exp(-0.4029 * r / a) + 0.02817 * math.exp(-0.20162 * r / a)
    return 27.211386 * 0.529177 * first * second / r * phi


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(potential(collate([AtomicData.from_ase(atoms)]), create_graph=False).energy)


@pytest.mark.parametrize("r", [0.3, 0.8, 1.2, 1.4999])
def test_a_pair_has_the_screened_coulomb_energy(r: float) -> None:
    atoms = Atoms("InP", positions=[[0, 0, 0], [0, 0, r]])
    found = energy(make_repulsive(1.5), atoms) - energy(make_repulsive(None), atoms)
    x = r / 1.5
    assert found == pytest.approx(published(49, 15, r) * math.exp(-x * x / (1 - x * x)), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("r", [0.3, 1.2, 1.4999])
def test_a_guarded_pair_has_the_energy_of_the_formula(r: float) -> None:
    atoms = Atoms("InP", positions=[[0, 0, 0], [0, 0, r]])
    found = energy(make_repulsive(1.5, "core_guard"), atoms) - energy(make_repulsive(None), atoms)
    assert found == pytest.approx(150 * (1.5 - r) ** 4 / (1.5 - r + 0.1), rel=1e-6, abs=1e-12)


def test_a_bond_that_training_did_not_show_is_behind_a_hill_and_feels_no_force() -> None:
    """H–H with an onset of 1.5 Å and a longest bond of 0.744 Å: half the height is in the middle."""
    height = 25 * (1.5 - 0.744) ** 2
    for r, expected, force in ((0.5, height, False), (0.74, height, False), (1.122, height / 2, True)):
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, r]])
        batch = collate([AtomicData.from_ase(atoms)])
        guarded, bare = (make_repulsive(onset, "core_guard")(batch) for onset in (1.5, None))
        assert float(guarded.energy - bare.energy) == pytest.approx(expected, rel=1e-6)
        assert (float((guarded.forces - bare.forces).abs().max()) > 1e-9) == force


@pytest.mark.parametrize("r", [0.59, 0.62, 1.0, 1.2, 1.23, 1.4, 1.4999, 1.51])
def test_a_bond_in_the_gap_has_the_energy_of_the_formula(r: float) -> None:
    """The gap from 0.6 to 1.5 Å has its fall from 1.23 Å on."""
    atoms = Atoms("InP", positions=[[0, 0, 0], [0, 0, r]])
    found = energy(make_repulsive(1.5, "bond_guard"), atoms) - energy(make_repulsive(None), atoms)
    x, u = max(r - 0.6, 0.0), min(max((1.5 - r) / 0.27, 0.0), 1.0)
    expected = 8 * x**4 / (x + 0.05) ** 2 * (35 * u**4 - 84 * u**5 + 70 * u**6 - 20 * u**7)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("term", ["core_guard", "bond_guard"])
@pytest.mark.parametrize("end", ["onset", "start"])
def test_three_derivatives_of_a_guard_vanish_at_its_ends(term: str, end: str) -> None:
    """The third difference goes to zero with the step."""
    guard = getattr(make_repulsive(1.5, term), term)
    at = float(getattr(guard, end if term == "bond_guard" else "onset")[6, 6])
    carbon = torch.full((4,), 6)

    def third(step: float) -> float:
        r = at + step * torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
        onset = guard.onset[carbon, carbon].double()
        inside = (r < onset) & (r.square() > guard.inner_square(carbon, carbon))
        energies, slopes = guard.pair_energies(r.square(), inside, carbon, carbon, onset)
        energies, slopes = torch.where(inside, energies, 0.0), torch.where(inside, slopes, 0.0)
        assert float(energies.abs().max()) > 0.0
        assert float((slopes * r).abs().max()) < 1e7 * step**3
        return abs(float(energies @ torch.tensor([-1.0, 3.0, -3.0, 1.0], dtype=torch.float64))) / step**3

    assert third(1e-5) < 0.11 * third(1e-4) < 0.02 * third(1e-2) + 11.0


def test_bonds_of_training_keep_what_they_learned() -> None:
    """Energies and forces of the training set to the last bit; a bond a little longer than all is held."""
    molecules = [ase.build.molecule(name) for name in ("CH3CH2OH", "CH3OH", "CH4", "H2O")]
    for seed, atoms in enumerate(molecules):
        atoms.rattle(0.05, seed=seed)
    structures = [AtomicData.from_ase(atoms) for atoms in molecules]
    bare, guarded = make_repulsive(None), make_repulsive(None)
    fit_onsets({guarded.repulsion: None, guarded.bond_guard: 0.9}, [structures], guarded.cutoff)
    assert guarded.bond_guard
    batch = collate(structures)
    for compute in (bare, guarded):
        compute.eval()
    assert torch.equal(bare(batch).energy, guarded(batch).energy)
    assert torch.equal(bare(batch).forces, guarded(batch).forces)
    assert torch.allclose(bare.hessian(molecules[2]), guarded.hessian(molecules[2]), atol=1e-12)
    longer = molecules[2].copy()
    longer.set_distance(0, 1, float(guarded.bond_guard.start[1, 6]) + 0.2, fix=0)
    assert energy(guarded, longer) > energy(bare, longer) + 0.1


@pytest.mark.parametrize("term", TERMS)
def test_beyond_the_onset_nothing_changes(term: str) -> None:
    atoms = ase.build.molecule("CH3CH2OH")
    batch = collate([AtomicData.from_ase(atoms)])
    bare, walled = (make_repulsive(onset, term)(batch, create_graph=False) for onset in (None, 0.9))
    assert torch.equal(bare.energy, walled.energy)
    assert torch.equal(bare.forces, walled.forces)


@pytest.mark.parametrize("term", TERMS)
def test_contracts_hold_where_atoms_repel(term: str) -> None:
    molecule = ase.build.molecule("CH3OH")
    crystal = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True)
    crystal.rattle(0.1, seed=1)
    rod = Atoms("C2", positions=[[0, 0, 0], [0.1, 1.3, 0.2]], cell=[[2.6, 0.4, 0], [0, 0, 0], [0, 0, 0]],
                pbc=[True, False, False])  # fmt: skip
    potential = make_repulsive(2.7, term)
    assert energy(potential, molecule) > energy(make_repulsive(None), molecule) + 1.0
    check_potential(potential, [molecule, crystal, rod])


@pytest.mark.parametrize("term", TERMS)
def test_hessians_and_virials_of_atoms_have_it(term: str) -> None:
    potential, atoms = make_repulsive(2.0, term), ase.build.molecule("CH3OH")
    atoms.rattle(0.05, seed=0)
    near = potential.hessian(atoms, method="finite_differences", step=1e-5)
    found = potential.hessian(atoms)
    assert float((near - found).abs().max()) < 1e-6 * float(found.abs().max())
    crystal = ase.build.bulk("Cu", "fcc", a=2.5)
    out = make_repulsive(2.0, term)(collate([AtomicData.from_ase(crystal)]), compute_stress=True, compute_virials=True)
    assert torch.allclose(out.atomic_virials.sum(0), out.stress[0] * crystal.cell.volume, atol=1e-8)


@pytest.mark.parametrize("term", TERMS)
def test_direct_forces_have_it_too(term: str) -> None:
    atoms = Atoms("C2H", positions=[[0, 0, 0], [0, 0, 0.9], [0, 2.0, 0]])
    batch = collate([AtomicData.from_ase(atoms)])
    bare, walled = (make_repulsive(onset, term, forces="direct")(batch, create_graph=False) for onset in (None, 1.2))
    found = (walled.forces - bare.forces).detach().numpy()
    step = 1e-5
    moved = [atoms.copy() for _ in range(2)]
    moved[0].positions[1, 2] += step
    moved[1].positions[1, 2] -= step
    core = [energy(make_repulsive(1.2, term), a) - energy(make_repulsive(None), a) for a in moved]
    np.testing.assert_allclose(found[1, 2], -(core[0] - core[1]) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose(found, [[0, 0, -found[1, 2]], [0, 0, found[1, 2]], [0, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_training_on_forces_goes_through_it(term: str) -> None:
    potential = make_repulsive(2.0, term).train()
    prediction = potential(collate([AtomicData.from_ase(ase.build.molecule("CH4"))]), compute_stress=True)
    (prediction.forces.square().sum() + prediction.energy.sum()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in potential.parameters() if p.grad is not None)


def test_it_keeps_atoms_apart() -> None:
    """Two atoms thrown at each other bounce, where the bare potential lets them through."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    closest = {}
    for onset in (None, 1.2):
        atoms = Atoms("C2", positions=[[0, 0, 0], [0, 0, 1.8]])
        atoms.set_velocities([[0, 0, 0.35], [0, 0, -0.35]])
        atoms.calc = EScAIPCalculator(make_repulsive(onset), device="cpu")
        path = []
        dynamics = VelocityVerlet(atoms, 0.2 * units.fs)
        dynamics.attach(lambda atoms=atoms, path=path: path.append(atoms.get_distance(0, 1)))
        dynamics.run(150)
        closest[onset] = min(path)
    assert closest[None] < 0.1
    assert closest[1.2] > 0.4


def test_files_keep_it_whatever_their_precision(tmp_path: Path) -> None:
    potential = make_repulsive(None)
    names = ("repulsion.onset", "core_guard.onset", "bond_guard.onset", "bond_guard.start")
    for name in names:
        term, table = name.split(".")
        setattr(getattr(potential, term), table, torch.rand(119, 119))
    potential.save(tmp_path / "walled.escaip")
    potential.float().double()
    for dtype in ("float32", "float64"):
        loaded = load_potential(tmp_path / "walled.escaip", device="cpu", dtype=dtype)
        for name in names:
            assert torch.equal(loaded.get_buffer(name), potential.get_buffer(name))
            assert loaded.get_buffer(name).dtype == torch.float32
    make_repulsive(None).save(tmp_path / "bare.escaip")
    bare = load_potential(tmp_path / "bare.escaip", device="cpu")
    assert not bare.repulsion
    assert not bare.core_guard
    assert not bare.bond_guard
    assert not [name for name in bare.state_dict() if name.endswith(("onset", "start"))]


def test_distances_are_the_shortest_of_a_set() -> None:
    sets = [ase.build.molecule("CO"), ase.build.molecule("CH4"), Atoms("C2", positions=[[0, 0, 0], [0, 0, 5.0]])]
    copper = ase.build.bulk("Cu", "fcc", a=3.6)  # its only neighbors are its own images
    copper.set_cell(copper.cell * 0.9, scale_atoms=True)
    across = Atoms("HF", positions=[[0.1, 0, 0], [4.2, 0, 0]], cell=[5.0] * 3, pbc=True)
    distances = measure_distances([AtomicData.from_ase(atoms) for atoms in (*sets, copper, across)], 3.0)
    found, _, longest, apart = distances
    assert torch.equal(found, found.T)
    assert float(found[6, 8]) == pytest.approx(sets[0].get_distance(0, 1))
    assert float(found[1, 6]) == pytest.approx(1.0897, abs=1e-3)
    assert float(found[1, 9]) == pytest.approx(0.9)
    assert float(found[29, 29]) == pytest.approx(0.9 * 3.6 / math.sqrt(2))
    assert float(found[1, 1]) == pytest.approx(1.779, abs=1e-3)
    assert math.isinf(float(found[6, 6]))
    assert torch.equal(longest, longest.T)
    assert torch.equal(apart, apart.T)
    assert float(longest[6, 8]) == pytest.approx(sets[0].get_distance(0, 1))
    assert float(longest[29, 29]) == pytest.approx(0.9 * 3.6 / math.sqrt(2))
    assert float(longest[1, 1]) == 0.0
    assert float(apart[1, 1]) == pytest.approx(1.779, abs=1e-3)
    assert math.isinf(float(apart[6, 8]))


def test_a_large_set_is_sampled() -> None:
    structures = [AtomicData.from_ase(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.5 + 0.001 * i]])) for i in range(100)]
    assert float(measure_distances(structures, 2.0, 2).closest[1, 1]) == pytest.approx(0.5)
    assert float(measure_distances(structures[::-1], 2.0, 2).closest[1, 1]) == pytest.approx(0.5)
    assert float(measure_distances(structures[1:], 2.0, 1).closest[1, 1]) == pytest.approx(0.501)


def pair(symbols: str, distance: float) -> AtomicData:
    return AtomicData.from_ase(Atoms(symbols, positions=[[0, 0, 0], [0, 0, distance]]))


def test_a_shortest_distance_varies_among_the_structures_that_show_it() -> None:
    """Two chemistries one after the other; of 96 structures 64 show C and O in eight parts, from 1.30 to 1.37 Å."""
    structures = [pair("CO", 1.30 + 0.01 * (i // 8)) for i in range(64)]
    structures[3] = pair("CO", 0.9)
    structures += [pair("N2", 1.1)] * 12 + [pair("H2", 0.74)] * 11 + [pair("F2", 1.4)] * 9
    distances = measure_distances(structures, 3.0)
    assert float(distances.closest[6, 8]) == pytest.approx(0.9)
    assert float(distances.varies[6, 8]) == pytest.approx(1.35 - 0.9)
    assert float(distances.closest[1, 1]) == pytest.approx(0.74)
    for element, known in ((7, True), (1, False), (9, False), (6, False)):  # an eighth is twelve
        assert bool(distances.varies[element, element].isfinite()) == known


@pytest.mark.parametrize(("count", "others", "known"), [(1, 0, True), (7, 0, True), (7, 1, False), (8, 56, True)])
def test_few_structures_are_enough_when_there_are_no_others(count: int, others: int, known: bool) -> None:
    """Of up to eight structures all must show a distance, of more eight."""
    structures = [pair("CO", 1.2)] * count + [pair("N2", 1.1)] * others
    assert bool(measure_distances(structures, 3.0).varies[6, 8].isfinite()) == known


def test_a_small_set_of_a_mixture_counts() -> None:
    """Alone it knows its distances, and the mixture the closest and the widest of all."""
    small, large = [pair("CO", 1.1), pair("CO", 1.2)], [pair("H2", 0.7 + 0.01 * i) for i in range(40)]
    large[-1] = pair("CO", 1.0)
    onsets = {}
    for name, sets in {"together": [small + large], "apart": [small, large]}.items():
        potential = make_repulsive(None, cutoff=2.5)
        fit_onsets({potential.core_guard: 0.98}, sets, potential.cutoff)
        onsets[name] = potential.core_guard.onset
    assert float(onsets["together"][6, 8]) == 0.0
    assert float(onsets["apart"][6, 8]) == pytest.approx(0.98 * 1.0 - 0.1)
    assert float(onsets["apart"][1, 1]) == pytest.approx(0.98 * 0.7 - 0.25)


def test_onsets() -> None:
    closest = torch.full((119, 119), math.inf, dtype=torch.float64)
    closest[6, 6], closest[1, 1], closest[8, 8] = 1.2, 1.5, 4.0
    found = zbl_onsets(closest, 0.8)
    assert float(found[6, 6]) == pytest.approx(0.96)
    for one, other in ((1, 6), (1, 1)):  # 1.5 Å is no bond
        assert float(found[one, other]) == pytest.approx(0.8 * 0.7 * (covalent_radii[one] + covalent_radii[other]))
    varies = torch.where(closest.isfinite(), 0.0, math.inf)
    varies[1, 1] = 0.3
    closest[7, 7], varies[7, 7] = 1.1, math.inf
    longest, apart = torch.zeros(119, 119), torch.full((119, 119), math.inf)
    longest[6, 6], apart[6, 6] = 1.65, 2.2
    longest[1, 8] = 1.0
    longest[8, 8], apart[8, 8] = 1.5, 1.6
    longest[26, 26], apart[26, 26] = 2.6, 4.0
    distances = Distances(closest, varies, longest, apart)
    found = guard_onsets(distances, 0.8)
    assert float(found[6, 6]) == pytest.approx(0.96)
    assert float(found[1, 1]) == pytest.approx(1.2 - 0.3)
    assert float(found[8, 8]) == pytest.approx(2 * covalent_radii[8] + 1.0)
    assert float(found[1, 6]) == float(found[7, 7]) == 0.0
    start, end = bond_gaps(distances)
    assert float(start[6, 6]) == pytest.approx(1.683)
    assert float(end[6, 6]) == pytest.approx(1.98)
    assert float(end[1, 8]) == pytest.approx(covalent_radii[1] + covalent_radii[8] + 1.0)
    assert float(start[1, 8]) == pytest.approx(1.1 * (covalent_radii[1] + covalent_radii[8]))
    for one, other in ((1, 1), (8, 8), (26, 26)):  # no bond, no gap, and a metal
        assert float(start[one, other]) == float(end[one, other]) == 0.0
    with pytest.raises(ConfigError, match="bond_guard is"):
        bond_gaps(distances, 1.1)
    for fraction in (0.0, 1.1, math.nan):
        for onsets, measured in ((zbl_onsets, closest), (guard_onsets, distances)):
            with pytest.raises(ConfigError, match="it must be above 0 and at most 1, or null"):
                onsets(measured, fraction)


def test_nothing_repels_beyond_the_cutoff() -> None:
    """The onset of elements without a bond in training, 3.07 Å for cesium, is cut there too."""
    potential = make_repulsive(None, cutoff=2.5)
    cesium = Atoms("Cs2", positions=[[0, 0, 0], [0, 0, 5.5]])
    structures = [AtomicData.from_ase(cesium)]
    potential.repulsion.onset = zbl_onsets(measure_distances(structures, 6.0).closest)
    assert float(potential.repulsion.onset[55, 55]) == pytest.approx(0.9 * 5.5)
    fit_onsets({potential.repulsion: 0.9, potential.core_guard: None}, [structures], potential.cutoff)
    assert not potential.core_guard
    assert float(potential.repulsion.onset[55, 55]) == potential.cutoff
    inside, outside = (Atoms("Cs2", positions=[[0, 0, 0], [0, 0, potential.cutoff + x]]) for x in (-1e-3, 1e-3))
    bare = make_repulsive(None, cutoff=2.5)
    for atoms in (inside, outside):
        assert abs(energy(potential, atoms) - energy(bare, atoms)) < 1e-9


def test_a_file_says_where_it_begins(tmp_path: Path) -> None:
    potential = make_repulsive(None)
    potential.set_metadata(PotentialMetadata(elements=(1, 6)))
    for expected in ("none", [0.391, 0.981]):
        potential.save(tmp_path / "model.escaip")
        described = describe_model(tmp_path / "model.escaip")
        assert described["repulsion_below"] == expected
        assert described["guarded_below"] == ("none" if expected == "none" else [0.0, 1.62])
        assert described["bonds_held_beyond"] == ("none" if expected == "none" else [0.0, 1.177])
        terms = {potential.repulsion: 0.9, potential.core_guard: 0.98, potential.bond_guard: 0.9}
        fit_onsets(terms, [[AtomicData.from_ase(ase.build.molecule("CH4"))]], potential.cutoff)
