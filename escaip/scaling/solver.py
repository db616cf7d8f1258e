"""Many fits of one sum of powers at once: damped least squares with Huber's loss, batched in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

LOWEST, HIGHEST = -1.0, 3.0
"""Bounds of exponents: below zero, so that an interval can cover zero."""

NOTHING = 8.0
"""A term is taken for zero where its logarithm is this much below that of the lowest loss (0.03 % of it)."""

_GRID_EXPONENTS = (0.15, 0.5)
_GRID_FLOORS = (0.05, 0.5, 0.9)
_GRID_SHARES = (0.25, 0.75)
_POLISHED = 2


@dataclass(frozen=True)
class SumOfPowers:
    """``L = E + Σ_k c_k x_k^-p_k`` in logarithms.

    A vector of parameters is ``(log c_1 … log c_K, p_1 … p_K[, log E])``, where ``log c_k`` is that of the term at the
    geometric mean of ``x_k``: near the data, where it is known best.

    Attributes:
        logs: ``(K, n)`` logarithms of ``x_k`` less their means.
        floor: whether there is an E; without it E = 0.
        lower, upper: ``(P,)`` bounds of the parameters.
    """

    logs: Array
    floor: bool
    lower: Array
    upper: Array

    @classmethod
    def of(cls, logs: Array, y: Array, floor: bool) -> SumOfPowers:
        """For ``logs (K, n)``, centred, and ``y (n,)``, logarithms of losses, which set the bounds."""
        terms = len(logs)
        low, high = float(y.min()), float(y.max())
        ones = np.ones(terms)
        lower = np.concatenate([(low - NOTHING) * ones, LOWEST * ones, [low - NOTHING] * floor])
        upper = np.concatenate([(high + 1.0) * ones, HIGHEST * ones, [high] * floor])
        return cls(logs, floor, lower, upper)

    @property
    def num_parameters(self) -> int:
        """Of the law."""
        return len(self.lower)

    def at(self, logs: Array) -> SumOfPowers:
        """Returns the same law at other points, ``logs (K, m)`` less the same means."""
        return replace(self, logs=logs)

    def value(self, parameters: Array) -> Array:
        """Returns ``log L (R, n)`` of ``parameters (R, P)``."""
        exponents = self._terms(parameters)
        most = exponents.max(axis=1)
        value: Array = most + np.log(np.exp(exponents - most[:, None]).sum(axis=1))
        return value

    def value_and_jacobian(self, parameters: Array) -> tuple[Array, Array]:
        """Returns ``log L (R, n)`` and its derivatives ``(R, P, n)``."""
        exponents = self._terms(parameters)
        most = exponents.max(axis=1)
        shares = np.exp(exponents - most[:, None])
        total = shares.sum(axis=1)
        shares /= total[:, None]
        terms = len(self.logs)
        powers = shares[:, :terms]
        return most + np.log(total), np.concatenate([powers, -powers * self.logs, shares[:, terms:]], axis=1)

    def _terms(self, parameters: Array) -> Array:
        """``(R, K[+1], n)`` logarithms of the terms."""
        logs, terms = self.logs, len(self.logs)
        found = parameters[:, :terms, None] - parameters[:, terms : 2 * terms, None] * logs
        if not self.floor:
            return found
        constant = np.broadcast_to(parameters[:, -1, None, None], (len(parameters), 1, logs.shape[1]))
        return np.concatenate([found, constant], axis=1)

    def starts(self, y: Array) -> Array:
        """Returns ``(S, P)`` places to start from: every exponent, share and floor of a small grid.

        At the middle of the data the floor takes a share of the lowest loss and the terms share what is left.
        """
        terms = len(self.logs)
        middle, low = float(np.exp(np.median(y))), float(np.exp(y.min()))
        shares = [(1.0,)] if terms == 1 else [(share, 1.0 - share) for share in _GRID_SHARES]
        found = []
        for constant in [share * low for share in _GRID_FLOORS] if self.floor else [0.0]:
            for share in shares:
                heads = [float(np.log(one * (middle - constant) + 1e-3 * middle)) for one in share]
                for powers in np.stack(np.meshgrid(*[_GRID_EXPONENTS] * terms), -1).reshape(-1, terms):
                    found.append([*heads, *powers, *([float(np.log(constant))] if self.floor else [])])
        return np.clip(np.array(found), self.lower, self.upper)


def huber(residuals: Array, delta: float) -> Array:
    """Returns Huber's loss: ``r²/2`` up to ``δ``, ``δ(|r| − δ/2)`` beyond (Ann. Math. Stat. 35, 73 (1964))."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(law: SumOfPowers, y: Array, parameters: Array, delta: float, weights: Array | None = None) -> Array:
    """Returns the sums of losses ``(R,)`` of ``parameters (R, P)`` against ``y (R or 1, n)``."""
    losses = huber(law.value(parameters) - y, delta)
    return losses.sum(axis=1) if weights is None else (weights * losses).sum(axis=1)


def descend(
    law: SumOfPowers,
    y: Array,
    start: Array,
    delta: float,
    weights: Array | None = None,
    iterations: int = 60,
    tolerance: float = 1e-7,
) -> tuple[Array, Array]:
    """Minimises R objectives side by side, each from its own start.

    Levenberg-Marquardt steps on the quadratic that bounds Huber's loss from above at the present residuals (weights
    ``min(1, δ/|r|)``), inside the bounds of the law; a parameter that pushes against its bound is held. Fits that no
    longer gain are put aside.

    Args:
        law: the sum of powers.
        y: ``(R, n)`` logarithms of losses.
        start: ``(R, P)``.
        delta: of Huber's loss.
        weights: ``(R, n)``, how often each point counts; once by default.
        iterations: at most.
        tolerance: relative gain of the objective that ends a fit.

    Returns:
        parameters ``(R, P)`` and objectives ``(R,)``.
    """
    found = np.clip(start, law.lower, law.upper)
    weights = np.ones_like(y) if weights is None else weights
    losses = objective(law, y, found, delta, weights)
    damping = np.full(len(y), 1e-3)
    active = np.arange(len(y))
    quiet = np.zeros(len(y), dtype=np.int64)
    for _ in range(iterations):
        step = _step(law, y[active], found[active], delta, weights[active], damping[active])
        trial = np.clip(found[active] + step, law.lower, law.upper)
        reached = objective(law, y[active], trial, delta, weights[active])
        gain = losses[active] - reached
        better = gain > 0
        chosen = active[better]
        found[chosen], losses[chosen] = trial[better], reached[better]
        damping[active] = np.where(better, np.maximum(damping[active] * 0.2, 1e-9), damping[active] * 6.0)
        quiet[active] = np.where(better & (gain > tolerance * losses[active]), 0, quiet[active] + 1)
        active = active[(quiet[active] < 2) & (damping[active] < 1e8)]
        if len(active) == 0:
            break
    return found, losses


def _step(law: SumOfPowers, y: Array, at: Array, delta: float, weights: Array, damping: Array) -> Array:
    """Steps ``(R, P)`` of damped, reweighted least squares."""
    value, jacobian = law.value_and_jacobian(at)
    residuals = value - y
    scaled = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
    gradient = np.matmul(jacobian, (scaled * residuals)[:, :, None])[:, :, 0]
    held = ((at <= law.lower) & (gradient > 0)) | ((at >= law.upper) & (gradient < 0))
    free = ~held
    normal = np.matmul(jacobian * scaled[:, None, :], jacobian.transpose(0, 2, 1))
    normal = normal * free[:, :, None] * free[:, None, :]
    diagonal = np.einsum("rpp->rp", normal).copy()
    scale = np.maximum(diagonal, 1e-6 * diagonal.max(axis=1, keepdims=True) + 1e-12)
    index = np.arange(law.num_parameters)
    normal[:, index, index] += damping[:, None] * scale + held
    return -np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0]


def minimize_from_grid(law: SumOfPowers, y: Array, delta: float) -> tuple[Array, float, Array]:
    """The best fit of ``y (n,)`` over all starts of the grid, polished by L-BFGS-B with the analytic gradient.

    Returns:
        the parameters ``(P,)``, their objective, and the few distinct best minima ``(M, P)`` for later warm starts,
        best first.
    """
    starts = law.starts(y)
    wide = np.broadcast_to(y, (len(starts), len(y)))
    # A first descent with a loss as wide as the noise reaches the valleys; the narrow one then finds their bottoms.
    places, _ = descend(law, wide, starts, max(delta, 0.3), iterations=20, tolerance=1e-3)
    places, losses = descend(law, wide, places, delta)
    order = np.argsort(losses)
    kept: list[int] = []
    for one in order:
        if all(np.abs(places[one] - places[other]).max() > 0.05 for other in kept):
            kept.append(int(one))
        if len(kept) == _POLISHED:
            break
    polished = [_polish(law, y, places[one], delta) for one in kept]
    polished.sort(key=lambda pair: pair[1])
    minima = [polished[0][0]]
    minima += [place for place, loss in polished[1:] if np.abs(place - minima[0]).max() > 0.05]
    return minima[0], polished[0][1], np.stack(minima)


def _polish(law: SumOfPowers, y: Array, start: Array, delta: float) -> tuple[Array, float]:
    def function(parameters: Array) -> tuple[float, Array]:
        value, jacobian = law.value_and_jacobian(parameters[None])
        residuals = value[0] - y
        slope = np.clip(residuals, -delta, delta)
        return float(huber(residuals, delta).sum()) / delta, jacobian[0] @ slope / delta

    before = function(start)[0]
    bounds = list(zip(law.lower, law.upper, strict=True))
    result = minimize(function, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    best = (np.asarray(result.x), float(result.fun)) if result.fun < before else (start, before)
    return best[0], best[1] * delta
