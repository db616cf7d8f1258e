"""A constant plus powers, and the numerical work of fitting it by Huber's loss from one start or many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares

Array = NDArray[np.float64]

BOUNDS = (-1.0, 3.0)
"""Bounds of exponents: below zero, so that an interval can cover zero."""


@dataclass(frozen=True)
class SumOfPowers:
    """The law ``L = e L_min + Σ_k exp(h_k − p_k (log x_k − m_k))``, with ``m_k`` the mean of ``log x_k``.

    A vector of parameters is ``(h_1 … h_K, p_1 … p_K[, e])``.

    Attributes:
        center: ``(K, 1)`` ``m_k``.
        lowest: ``L_min``, the lowest loss.
        floor: whether the law has an E.
        lower, upper: ``(P,)`` bounds of the parameters.
    """

    center: Array
    lowest: float
    floor: bool
    lower: Array
    upper: Array

    @classmethod
    def of(cls, x: Array, y: Array, floor: bool) -> SumOfPowers:
        """Makes the law for inputs ``x (K, n)`` and ``y = log L (n,)``, which set center and bounds."""
        heads = np.array([[y.min() - 8.0] * len(x), [y.max() + 1.0] * len(x)])
        powers = np.repeat(np.array(BOUNDS)[:, None], len(x), axis=1)
        ends = np.array([[0.0], [1.0]])[:, : int(floor)]
        lower, upper = np.concatenate([heads, powers, ends], axis=1)
        return cls(np.log(x).mean(axis=1, keepdims=True), float(np.exp(y.min())), floor, lower, upper)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return len(self.lower)

    def value(self, parameters: Array, logs: Array) -> Array:
        """Returns log L ``(…, n)`` of ``parameters (…, P)`` at ``logs = log x − center (K, n)``."""
        found: Array = np.logaddexp.reduce(self._terms(parameters, logs), axis=-2)
        return found

    def jacobian(self, parameters: Array, logs: Array) -> Array:
        """Returns the derivatives ``(…, n, P)`` of log L by ``parameters (…, P)``."""
        terms, num_inputs = self._terms(parameters, logs), len(logs)
        value = np.logaddexp.reduce(terms, axis=-2)[..., None, :]
        shares = np.exp(terms[..., :num_inputs, :] - value)
        floor = self.lowest * np.exp(-value)[..., : int(self.floor), :]
        return np.concatenate([shares, -shares * logs, floor], axis=-2).swapaxes(-1, -2)

    def _terms(self, parameters: Array, logs: Array) -> Array:
        """Logarithms ``(…, K[+1], n)`` of the terms of the sum."""
        num_inputs = len(logs)
        terms = parameters[..., :num_inputs, None] - parameters[..., num_inputs : 2 * num_inputs, None] * logs
        if not self.floor:
            return terms
        constant = np.log(np.maximum(parameters[..., -1:, None] * self.lowest, 1e-300))
        return np.concatenate([terms, np.broadcast_to(constant, (*terms.shape[:-2], 1, logs.shape[1]))], axis=-2)

    def starts(self, y: Array) -> Array:
        """Returns a grid of parameters ``(S, P)`` over exponents, E, and shares of the terms in the median loss."""
        num_inputs, middle = len(self.center), float(np.exp(np.median(y)))
        found = []
        for constant in (0.05, 0.5, 0.9) if self.floor else (0.0,):
            for first in (0.25, 0.75) if num_inputs == 2 else (1.0,):
                shares = np.array([first, 1.0 - first][:num_inputs])
                heads = np.log(shares * (middle - constant * self.lowest) + 1e-3 * middle)
                for powers in np.stack(np.meshgrid(*[(0.15, 0.5)] * num_inputs), -1).reshape(-1, num_inputs):
                    found.append([*heads, *powers, *[constant] * self.floor])
        return np.clip(np.array(found), self.lower, self.upper)

    def minimize(self, logs: Array, y: Array, start: Array, delta: float, tolerance: float) -> OptimizeResult:
        """Fits ``y (n,)`` from one start with Huber's loss."""
        return least_squares(
            lambda one: self.value(one, logs) - y, start, lambda one: self.jacobian(one, logs), loss="huber",
            bounds=(self.lower, self.upper), f_scale=delta, ftol=tolerance, xtol=tolerance, gtol=None, max_nfev=300,
        )  # fmt: skip

    def best(self, logs: Array, y: Array, delta: float) -> Array:
        """Fits ``y (n,)`` from the grid: roughly from all starts, then to the end from the best few that differ."""
        rough = self.descend(logs, y, self.starts(y), max(delta, 0.3))
        kept: list[Array] = []
        for one in rough[np.argsort(huber_loss(self.value(rough, logs) - y, max(delta, 0.3)))]:
            if all(np.abs(one - other).max() > 0.05 for other in kept):
                kept.append(one)
        near = [self.minimize(logs, y, start, max(delta, 0.05), 1e-3).x for start in kept[:3]]
        fine = [self.minimize(logs, y, start, delta, 1e-9) for start in near]
        found: Array = min(fine, key=lambda result: float(result.cost)).x
        return found

    def descend(self, logs: Array, y: Array, start: Array, delta: float) -> Array:
        """Fits ``y (R or 1, n)`` from ``start (R, P)`` side by side, twenty times as fast as one after the other.

        Levenberg-Marquardt steps are taken on the parabola that bounds Huber's loss from above at the present
        residuals, with weights ``min(1, δ/|r|)``; a parameter that pushes against its bound is held.
        """
        at, damping = start.copy(), np.full(len(start), 1e-3)
        residuals = self.value(at, logs) - y
        cost, quiet = huber_loss(residuals, delta), np.zeros(len(start))
        for _ in range(60):
            jacobian, weights = self.jacobian(at, logs), np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
            gradient = np.einsum("rnp,rn->rp", jacobian, weights * residuals)
            free = ~(((at <= self.lower) & (gradient > 0)) | ((at >= self.upper) & (gradient < 0)))
            jacobian *= free[:, None, :]
            normal = (jacobian * weights[:, :, None]).swapaxes(1, 2) @ jacobian
            diagonal = np.einsum("rpp->rp", normal)  # a view
            diagonal += damping[:, None] * np.maximum(diagonal, 1e-6 * diagonal.max(axis=1, keepdims=True) + 1e-12)
            diagonal += ~free
            step = np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0]
            trial = np.clip(at - step, self.lower, self.upper)
            reached = self.value(trial, logs) - y
            gain = cost - huber_loss(reached, delta)
            better = gain > 0
            quiet = np.where(gain > 1e-7 * cost, 0, quiet + 1)
            at[better], residuals[better], cost[better] = trial[better], reached[better], (cost - gain)[better]
            damping = np.where(better, np.maximum(0.2 * damping, 1e-9), np.minimum(6.0 * damping, 1e8))
            if (quiet > 2).all():
                break
        return at


def huber_loss(residuals: Array, delta: float) -> Array:
    """Returns the sums of Huber's loss of ``residuals (R, n)``: ``r²/2`` up to δ, ``δ(|r| − δ/2)`` beyond."""
    size = np.abs(residuals)
    found: Array = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(axis=1)
    return found
