"""Second derivatives of the energy with respect to positions."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from escaip.data import AtomicData, collate
from escaip.errors import ConfigError, DataError
from escaip.potential.derivatives import frozen
from escaip.potential.predict import PotentialLike, as_data, estimate_tokens, iter_predict

METHODS = ("autograd", "finite_differences")
_STEP = 0.01
# Larger batches are not faster on one core, and memory grows with them.
_TOKENS_AT_ONCE = {"cpu": 500, "cuda": 20_000}
# Largest |H_ij − H_ji| beside the largest entry that rounding explains.
_LARGEST_ASYMMETRY = {torch.float64: 1e-8, torch.float32: 1e-3}


def hessian(
    potential: PotentialLike,
    structure: Any,
    *,
    method: str = "autograd",
    step: float = _STEP,
    symmetrize: bool = True,
    dtype: torch.dtype | None = None,
    copies: int | None = None,
) -> Tensor:
    """Computes ``∂²E/∂r_i∂r_j`` of one structure; the potential is not changed.

    With automatic differentiation, a row is the derivative of one component of the forces. A batch holds several copies
    of the structure, and each backward pass gives one row per copy: the cost is one evaluation of energy and forces of
    the copies, and ``3n / copies`` backward passes. ``potential.recompute = True`` trades time for memory. In float32
    entries are accurate to about 1e-5 of the largest; use ``dtype=torch.float64`` where soft modes matter.

    Args:
        potential: on any device, in either mode; dropout is off.
        structure: ASE atoms, ``AtomicData`` or a pymatgen structure or molecule of ``n`` atoms.
        method: ``"autograd"``, or ``"finite_differences"`` for central differences of forces, the only method for
            models whose forces are not derivatives of the energy.
        step: of finite differences, Å.
        symmetrize: return ``(H + Hᵀ)/2``. The asymmetry is measured first: an error where automatic differentiation
            gives more than rounding, a warning with its size for a direct-force model.
        dtype: precision in which a copy of the potential is evaluated; by default the potential's own.
        copies: number of copies in a batch; by default chosen for the device.

    Returns:
        ``(3n, 3n)`` float64 on the CPU, eV/Å²: row and column ``3i + x`` are component ``x`` of atom ``i``.

    Raises:
        ConfigError: a direct-force model without ``method="finite_differences"``, a ``precision`` other than
            ``"highest"``, or an argument out of range.
        DataError: an invalid structure, or derivatives that are NaN or depend on their order.
        UnsupportedElementError: an element the potential was not trained on.
    """
    _check(potential, method, step, copies)
    data = as_data(structure, 0)
    own = potential if dtype is None or dtype == potential.dtype else copy.deepcopy(potential).to(dtype)
    with torch.inference_mode(False), _evaluating(own):
        if method == "autograd":
            rows = _by_autograd(own, data, copies or _copies(own, data))
        else:
            rows = _by_differences(own, data, step)
    if not bool(torch.isfinite(rows).all()):
        raise DataError("second derivatives are NaN or infinite: check the structure for atoms at one place")
    _check_symmetry(own, rows, method)
    return 0.5 * (rows + rows.T) if symmetrize else rows


def asymmetry(matrix: Tensor) -> float:
    """Returns the largest ``|H_ij − H_ji|`` divided by the largest ``|H_ij|``; 0 for a matrix of zeros."""
    largest = float(matrix.abs().max())
    return float((matrix - matrix.T).abs().max()) / largest if largest else 0.0


def _check(potential: PotentialLike, method: str, step: float, copies: int | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}: choose {' or '.join(METHODS)}")
    if method == "autograd" and not potential.config.is_conservative:
        raise ConfigError(
            "forces of a direct-force model are no derivatives of its energy, and their Jacobian is not symmetric: use "
            "a model trained with forces: conservative, or ask for finite differences (method='finite_differences', "
            "--finite-differences)"
        )
    if potential.precision != "highest":
        raise ConfigError(f"second derivatives do not survive precision {potential.precision!r}: set it to 'highest'")
    if not step > 0.0:
        raise ConfigError(f"step is {step} Å: it must be above 0")
    if copies is not None and copies < 1:
        raise ConfigError(f"copies is {copies}: it must be at least 1")


def _check_symmetry(potential: PotentialLike, rows: Tensor, method: str) -> None:
    found = asymmetry(rows)
    if method == "autograd" and found > _LARGEST_ASYMMETRY[potential.dtype]:
        raise DataError(
            f"second derivatives depend on their order by {found:.1e} of the largest: at this structure the energy is "
            "not smooth in this precision: displace the atoms a little, or ask for float64"
        )
    if not potential.config.is_conservative:
        warnings.warn(
            f"forces of this model are no derivatives: their Jacobian is asymmetric by {100 * found:.2g} % of its "
            "largest entry, and frequencies mean no more than that",
            stacklevel=3,
        )


@contextlib.contextmanager
def _evaluating(potential: PotentialLike) -> Iterator[None]:
    """Puts a potential into evaluation mode and restores its mode afterwards."""
    training = potential.training
    potential.train(False)
    try:
        yield
    finally:
        potential.train(training)


def _copies(potential: PotentialLike, data: AtomicData) -> int:
    tokens = estimate_tokens(data, potential.config.graph)
    return max(1, min(3 * len(data.positions), _TOKENS_AT_ONCE[potential.device.type] // tokens))


def _by_autograd(potential: PotentialLike, data: AtomicData, copies: int) -> Tensor:
    size = data.positions.numel()
    copies = min(copies, size)
    batch = collate([data] * copies).to(potential.device)
    positions = batch.positions.detach().clone().requires_grad_()
    batch.positions = positions
    rows = torch.empty(size, size, dtype=torch.float64)
    with torch.enable_grad(), frozen(potential.model):
        forces = potential(batch, create_graph=True).forces
        assert forces is not None
        for start in range(0, size, copies):
            count = min(copies, size - start)
            chosen = torch.zeros(copies, size, dtype=forces.dtype, device=forces.device)
            chosen[:count, start : start + count].fill_diagonal_(-1.0)
            (gradient,) = torch.autograd.grad(
                forces, positions, chosen.view_as(forces), retain_graph=start + count < size, materialize_grads=True
            )
            rows[start : start + count] = gradient.view(copies, size)[:count].cpu()
    return rows


def _by_differences(potential: PotentialLike, data: AtomicData, step: float) -> Tensor:
    size = data.positions.numel()

    def displaced() -> Iterator[AtomicData]:
        for index in range(size):
            for sign in (1.0, -1.0):
                moved = data.clone()
                moved.positions.view(-1)[index] += sign * step
                yield moved

    rows = []
    for found in iter_predict(potential, displaced()):
        assert found.forces is not None
        rows.append(found.forces.double().reshape(-1))
    forces = torch.stack(rows)
    ahead, behind = forces.view(size, 2, size).unbind(1)
    return (behind - ahead) / (2.0 * step)
