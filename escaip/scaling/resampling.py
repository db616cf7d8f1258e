"""How far a fit is to be trusted: the noise of its points and refits of points drawn anew.

What is drawn. Runs of one cell (the same size and data, other seeds) move together: a replicate is the fitted law
plus a normal displacement of every cell in log L, and is fitted anew from the best minima of the fit itself. The
scale of the displacements is that of the mean residuals of the cells over ``ν = cells − parameters`` degrees of
freedom, divided by the root of a ``χ²_ν/ν`` that is drawn for each replicate: quantiles of the refits are then those
of Student's t where the law is linear in its parameters, and not those of a normal distribution of known width, which
is too narrow for the dozen cells of a study. A scale from seeds alone would miss what all seeds of a cell share, such
as a learning rate that suits one size less well. Intervals are percentiles of the refits.

Where E = 0 is not refuted (F test, 5 %), the law with E = 0 is drawn and refitted as well, and intervals hold those
of both: a fit whose E is above zero by chance has exponents that are too large, and its refits do not come back.
Without this the interval of γ held the truth in 81 % of 120 repeats (E = 0, six budgets of three seeds), every miss
on that side.

Why not cells drawn with replacement, then seeds in them. With a dozen cells such a sample often lacks a corner of the
grid, and its exponents are then undetermined: intervals that were 10 to 40 % wider than these and held α, β and γ in
93 to 100 % of 100 repeats (4 sizes × 3 data sizes × 2 seeds, 3 % noise, two laws). Without the factor ``χ²_ν/ν`` and
with the noise of single runs they held them in 78 to 93 %. Bias-corrected percentiles did worse than plain ones where
E is small, since replicates gather at its bound (E in 66 to 84 %). benchmarks/scaling_recovery.py measures the
coverage of what is done here.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 9, 13 and 14; Davison and Hinkley,
Bootstrap Methods and their Application (1997), chapter 6; Seber and Wild, Nonlinear Regression (1989), chapter 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escaip.scaling.solver import Array, SumOfPowers, descend

FEWEST_FREE = 3
"""Degrees of freedom below which the noise of cells is taken from their seeds, too."""


@dataclass(frozen=True)
class Cells:
    """Runs grouped by equal inputs.

    Attributes:
        index: ``(n,)`` cell of each run.
        first: ``(C,)`` a run of each cell.
        counts: ``(C,)`` runs of each cell.
        means: ``(C,)`` mean log L.
    """

    index: NDArray[np.int64]
    first: NDArray[np.int64]
    counts: Array
    means: Array

    @classmethod
    def of(cls, inputs: Array, y: Array) -> Cells:
        """From ``inputs (K, n)`` and ``y = log L (n,)``; inputs that differ by less than a millionth are equal."""
        keys = np.round(np.log(inputs), 6)
        _, first, index = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        index = index.reshape(-1)
        counts = np.bincount(index).astype(np.float64)
        return cls(index, first, counts, np.bincount(index, weights=y) / counts)


@dataclass(frozen=True)
class Noise:
    """Of log L about the law.

    Attributes:
        run: standard deviation of a single run; of the mean of m seeds it is taken for ``run/√m``.
        freedom: degrees of freedom of ``run``; 0 where nothing is left to tell the noise from.
        seeds: standard deviation between seeds of the same cell; None without such.
        seed_freedom: of ``seeds``.
    """

    run: float
    freedom: int
    seeds: float | None
    seed_freedom: int

    @classmethod
    def of(cls, residuals: Array, cells: Cells, num_parameters: int) -> Noise:
        """From ``residuals (n,)`` of all runs."""
        n, num_cells = len(residuals), len(cells.first)
        means = np.bincount(cells.index, weights=residuals) / cells.counts
        within = float(((residuals - means[cells.index]) ** 2).sum())
        seed_freedom = n - num_cells
        seeds = float(np.sqrt(within / seed_freedom)) if seed_freedom > 0 else None
        between, freedom = float((cells.counts * means**2).sum()), num_cells - num_parameters
        if freedom < FEWEST_FREE:
            between, freedom = between + within, n - num_parameters
        return cls(float(np.sqrt(between / freedom)) if freedom > 0 else 0.0, freedom, seeds, seed_freedom)

    def draw(self, shape: tuple[int, int], counts: Array, rng: np.random.Generator) -> Array:
        """Returns displacements ``shape = (R, C)`` of means of ``counts (C,)`` seeds."""
        inflation = np.sqrt(self.freedom / rng.chisquare(self.freedom, size=(shape[0], 1)))
        drawn: Array = self.run * inflation * rng.standard_normal(shape) / np.sqrt(counts)
        return drawn


def refits(law: SumOfPowers, minima: Array, cells: Cells, noise: Noise, delta: float, number: int, seed: int) -> Array:
    """Returns the parameters ``(R, P)`` of ``number`` refits; none where the noise is not known.

    Args:
        law: that was fitted, its logs those of all runs.
        minima: ``(M, P)``, best first; replicates are drawn about the first and started from all.
        cells: of the runs.
        noise: about the law.
        delta: of Huber's loss.
        number: R.
        seed: of the drawing.
    """
    if noise.freedom == 0 or number == 0:
        return np.empty((0, law.num_parameters))
    rng = np.random.default_rng(seed)
    means = law.at(law.logs[:, cells.first])
    drawn = means.value(minima[:1]) + noise.draw((number, len(cells.first)), cells.counts, rng)
    weights = np.broadcast_to(cells.counts, drawn.shape)
    best, lowest = descend(means, drawn, np.repeat(minima[:1], number, axis=0), delta, weights)
    for other in minima[1:]:
        found, losses = descend(means, drawn, np.repeat(other[None], number, axis=0), delta, weights)
        better = losses < lowest
        best[better], lowest[better] = found[better], losses[better]
    return best
