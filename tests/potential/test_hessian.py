"""Second derivatives: against differences of forces, under rigid motions, by every method, and errors."""

from __future__ import annotations

from functools import partial

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from tiny import methanol

from escaip import EScAIPCalculator
from escaip.data import AtomicData
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.potential.hessian import asymmetry, hessian

make_potential = partial(tiny.make_potential, num_layers=2)


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
