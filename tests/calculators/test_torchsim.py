"""torch-sim: many systems at once, as ASE has each; first with a state that stands in, then with the program."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from tiny import rattled

from escaip import EScAIPCalculator
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.potential import Potential

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch-sim's own, at its import
    from escaip.calculators import torchsim
    from escaip.calculators.torchsim import EScAIPModel

Make = Callable[..., Potential]

installed = importlib.util.find_spec("torch_sim") is not None
needs_torch_sim = pytest.mark.skipif(
    not installed, reason="torch-sim is not installed: pip install torch-sim-atomistic"
)


@dataclasses.dataclass
class State:
    """What a model reads of torch-sim's ``SimState``: columns of ``cell`` are lattice vectors."""

    positions: torch.Tensor
    masses: torch.Tensor
    cell: torch.Tensor
    pbc: Any
    atomic_numbers: torch.Tensor
    system_idx: torch.Tensor
    charge: torch.Tensor | None = None
    spin: torch.Tensor | None = None


def state_of(structures: list[Atoms], dtype: torch.dtype = torch.float64, **more: Any) -> State:
    sizes = torch.tensor([len(atoms) for atoms in structures])
    return State(
        positions=torch.tensor(np.concatenate([atoms.positions for atoms in structures]), dtype=dtype),
        masses=torch.tensor(np.concatenate([atoms.get_masses() for atoms in structures]), dtype=dtype),
        cell=torch.tensor(np.stack([atoms.cell.array.T for atoms in structures]), dtype=dtype),
        pbc=more.pop("pbc", torch.tensor(structures[0].pbc)),
        atomic_numbers=torch.tensor(np.concatenate([atoms.numbers for atoms in structures])),
        system_idx=torch.repeat_interleave(torch.arange(len(structures)), sizes),
        **more,
    )


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model without torch-sim: its base class is then a plain module."""
    if not installed:
        monkeypatch.setattr(torchsim, "ModelInterface", object)


def crystals() -> list[Atoms]:
    """Cubic, oblique and turned, and one atom: nothing that rows and columns could be exchanged in."""
    oblique = Atoms("NaCl", positions=[[0.1, 0.0, 0.2], [2.9, 2.6, 3.1]], pbc=True)
    oblique.cell = [[0.3, 4.8, 0.5], [-4.9, 1.1, 0.4], [0.9, 0.7, 5.3]]
    return rattled(ase.build.bulk("Cu", cubic=True), oblique, ase.build.bulk("Fe"), width=0.1)


def molecules() -> list[Atoms]:
    return [ase.build.molecule(name) for name in ("CH3OH", "H2O", "C6H6", "O2")]


def check(model: EScAIPModel, potential: Potential, structures: list[Atoms], state: Any) -> None:
    found = model(state)
    forces = found["forces"].split([len(atoms) for atoms in structures])
    assert all(not value.requires_grad and value.dtype == model.dtype for value in found.values())
    for index, atoms in enumerate(structures):
        atoms = atoms.copy()
        atoms.calc = EScAIPCalculator(potential)
        assert float(found["energy"][index]) == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(forces[index].numpy(), atoms.get_forces(), atol=1e-10)
        if atoms.pbc.any():
            np.testing.assert_allclose(found["stress"][index].numpy(), atoms.get_stress(voigt=False), atol=1e-11)
        else:
            assert found["stress"][index].isnan().all()


@pytest.mark.parametrize("make", [crystals, molecules], ids=["crystals", "molecules"])
def test_every_system_of_a_state_is_as_ase_has_it(make: Callable[[], list[Atoms]], make_potential: Make) -> None:
    potential, structures = make_potential(), make()
    model = EScAIPModel(potential, "cpu")
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    state = state_of(structures)
    before = {name: getattr(state, name).clone() for name in ("positions", "cell", "atomic_numbers", "system_idx")}
    check(model, potential, structures, state)
    assert all(torch.equal(getattr(state, name), value) for name, value in before.items())
    alone = state_of(structures[:1], pbc=bool(structures[0].pbc.all()))  # one flag for all axes, as in torch-sim 0.3
    check(model, potential, structures[:1], alone)


def test_a_slab_is_periodic_along_some_axes(make_potential: Make) -> None:
    slab = ase.build.fcc111("Cu", (2, 2, 2), vacuum=4.0)
    slab.pbc = [True, True, False]
    check(EScAIPModel(make_potential(), "cpu"), make_potential(), [slab], state_of([slab], pbc=[True, True, False]))


def test_precisions_of_state_and_potential_are_two(make_potential: Make) -> None:
    potential, structures = make_potential(), crystals()
    exact = EScAIPModel(potential, "cpu")(state_of(structures))
    single = EScAIPModel(potential, "cpu", dtype="float32")
    assert single.potential.dtype == torch.float32
    assert single.dtype == torch.float64
    found = single(state_of(structures))
    torch.testing.assert_close(found["energy"], exact["energy"], atol=1e-4, rtol=0.0)
    assert not torch.equal(found["energy"], exact["energy"])
    short = EScAIPModel(potential, "cpu", torch.float32)
    assert short(state_of(structures, torch.float32))["stress"].dtype == torch.float32
    assert potential.dtype == torch.float64


def test_charges_and_spins_of_each_system(make_potential: Make) -> None:
    potential = make_potential(charge=True, spin=True)
    structures = [ase.build.molecule("CH3OH"), ase.build.molecule("CH3OH")]
    structures[1].info.update(charge=1, spin_multiplicity=2)
    state = state_of(structures, charge=torch.tensor([0, 1]), spin=torch.tensor([1.0, 2.0]))
    model = EScAIPModel(potential, "cpu")
    check(model, potential, structures, state)
    energy = model(state)["energy"]
    assert energy[0] != energy[1]
    ions = EScAIPModel(potential, "cpu", charge=1, spin=2)(state_of(structures))["energy"]
    torch.testing.assert_close(ions, energy[[1, 1]])


def test_what_is_not_asked_for_is_not_there(make_potential: Make) -> None:
    state = state_of(crystals())
    model = EScAIPModel(make_potential(), "cpu", compute_stress=False)
    assert set(model(state)) == {"energy", "forces"}
    model.compute_forces, model.compute_stress = False, True
    assert set(model(state)) == {"energy", "stress"}
    direct = EScAIPModel(make_potential(forces="direct"), "cpu")
    assert set(direct(state)) == {"energy", "forces"}
    with pytest.raises(NotImplementedError, match="no stress"):
        direct.compute_stress = True


def test_memory_scales_with_what_bounds_the_neighbors(make_potential: Make) -> None:
    assert EScAIPModel(make_potential(), "cpu").memory_scales_with == "n_atoms"
    radius = EScAIPModel(make_potential(num_neighbors=None), "cpu")
    assert radius.memory_scales_with == "n_atoms_x_density"


@pytest.mark.bad_input
def test_what_the_model_does_not_take(make_potential: Make) -> None:
    structures = molecules()
    with pytest.raises(UnsupportedElementError, match="not trained on O"):
        EScAIPModel(make_potential(elements=(1, 6)), "cpu")(state_of(structures))
    with pytest.raises(ConfigError, match="compute_stress: a direct-force model"):
        EScAIPModel(make_potential(forces="direct"), "cpu", compute_stress=True)
    model = EScAIPModel(make_potential(charge=True), "cpu")
    for charge in (torch.tensor([1]), torch.tensor([0.5, 0.0, 0.0, 0.0])):
        with pytest.raises(DataError, match="one whole number for each of the 4 systems"):
            model(state_of(structures, charge=charge))
    state = state_of(structures)
    state.positions[7, 1] = torch.nan
    with pytest.raises(DataError, match="system 1, atom 1"):
        model(state)


@pytest.mark.bad_input
def test_without_torch_sim_there_is_one_line(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchsim, "ModelInterface", None)
    with pytest.raises(ConfigError, match="pip install torch-sim-atomistic"):
        EScAIPModel(make_potential(), "cpu")


@needs_torch_sim
def test_the_contract_of_torch_sim(make_potential: Make) -> None:
    from torch_sim.models.interface import ModelInterface, validate_model_outputs

    model = EScAIPModel(make_potential(), "cpu")
    assert isinstance(model, ModelInterface)
    validate_model_outputs(model, torch.device("cpu"), torch.float64)


@needs_torch_sim
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trajectory_of_many_is_that_of_each_in_ase(make_potential: Make) -> None:
    import torch_sim

    potential, structures = make_potential(), crystals()
    potential.scale.fill_(0.3)
    state = torch_sim.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)
    momenta = np.random.default_rng(0).normal(size=state.positions.shape)
    state.momenta = torch.from_numpy(momenta)
    step, timestep = nve(EScAIPModel(potential, "cpu"), state, units.fs)
    for _ in range(20):
        state = step(state)
    for index, atoms in enumerate(structures):
        atoms.set_momenta(momenta[state.system_idx.numpy() == index])
        atoms.calc = EScAIPCalculator(potential)
        VelocityVerlet(atoms, timestep).run(20)
        mine = state.system_idx == index
        np.testing.assert_allclose(state.momenta[mine].numpy(), atoms.get_momenta(), atol=1e-9)
        assert float(state.energy[index]) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        fractional = np.linalg.solve(atoms.cell.array.T, (state.positions[mine].numpy() - atoms.positions).T)
        np.testing.assert_allclose(fractional, np.round(fractional), atol=1e-9)  # wrapped there, not in ASE


def nve(model: EScAIPModel, state: Any, timestep: float) -> tuple[Callable[[Any], Any], float]:
    """A step of torch-sim's integrator, whichever way its version starts one."""
    import torch_sim

    if hasattr(torch_sim, "nve_init"):
        started = torch_sim.nve_init(state, model, kT=0.0)
        first = [started]

        def step(given: Any) -> Any:
            return torch_sim.nve_step(first.pop() if first else given, model, dt=torch.tensor(timestep))
    else:
        begin, update = torch_sim.integrators.nve(model, dt=torch.tensor(timestep), kT=torch.tensor(0.0))
        first = [begin(state)]

        def step(given: Any) -> Any:
            return update(first.pop() if first else given)

    return step, timestep


@needs_torch_sim
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_batches_by_memory_give_the_same_answers(make_potential: Make) -> None:
    import torch_sim

    model, structures = EScAIPModel(make_potential(), "cpu"), crystals()
    batcher = torch_sim.BinningAutoBatcher(model, memory_scales_with=model.memory_scales_with, max_memory_scaler=5.0)
    together = torch_sim.static(structures, model)
    packed = torch_sim.static(structures, model, autobatcher=batcher)
    for one, other in zip(together, packed, strict=True):
        for name in ("potential_energy", "forces", "stress"):
            torch.testing.assert_close(one[name], other[name], atol=1e-10, rtol=0.0)
