"""The runs that are best for their compute."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from escaip.scaling.resampling import Cells

BINS_PER_DECADE = 3


def frontier(
    flops: ArrayLike, parameters: ArrayLike, structures: ArrayLike, losses: ArrayLike, bins: float = BINS_PER_DECADE
) -> NDArray[np.bool_]:
    """Chooses the lower envelope of loss over compute.

    In each bin of log C the cell (N, D) of the lowest geometric mean over its seeds, unless one of a cheaper bin is as
    good. The best of several noisy cells is on average better than it deserves, by less than the noise of their means;
    the intervals of a law fitted to the frontier take the choice as given.

    Args:
        flops: ``(n,)`` C of each run.
        parameters: ``(n,)`` N.
        structures: ``(n,)`` D.
        losses: ``(n,)`` positive.
        bins: per decade of C.

    Returns:
        ``(n,)`` whether a run is one of the chosen cells.
    """
    compute = np.asarray(flops, dtype=np.float64)
    inputs = np.stack([np.asarray(parameters, dtype=np.float64), np.asarray(structures, dtype=np.float64)])
    cells = Cells.of(inputs, np.log(np.asarray(losses, dtype=np.float64)))
    cost = np.bincount(cells.index, weights=np.log10(compute)) / cells.counts
    bin_of = np.floor((cost - cost.min()) * bins + 1e-9).astype(np.int64)
    chosen, lowest = [], np.inf
    for one in np.unique(bin_of):
        members = np.nonzero(bin_of == one)[0]
        best = members[np.argmin(cells.means[members])]
        if cells.means[best] < lowest:
            chosen.append(best)
            lowest = cells.means[best]
    return np.isin(cells.index, chosen)
