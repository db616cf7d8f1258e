"""Batches straight from a prepared store: slices of the mapped shards joined once, no structure in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from escaip.data.shards import STORED_FIELDS, read_text
from escaip.data.store import TARGET_DTYPES, Store
from escaip.data.structure import PER_ATOM_FIELDS, make_batch

if TYPE_CHECKING:
    from torch_geometric.data import Batch

_PER_ATOM = frozenset(PER_ATOM_FIELDS)


def gather_batch(store: Store, positions: Sequence[int] | NDArray[np.int64]) -> Batch:
    """What :func:`escaip.data.collate` makes of the structures at these positions of a store.

    Args:
        store: the store.
        positions: ``(B,)`` of the structures, each inside the store.
    """
    located = store.locate_many(positions)
    spans = [(arrays, *arrays["offsets"][local : local + 2].tolist()) for arrays, local in located]
    fields: dict[str, Any] = {}
    for key in STORED_FIELDS:
        if key in _PER_ATOM:
            pieces = [arrays[key][start:stop] for arrays, start, stop in spans]
        else:
            pieces = [arrays[key][local : local + 1] for arrays, local in located]
        joined = np.concatenate(pieces)
        fields[key] = torch.from_numpy(joined.astype(TARGET_DTYPES[key], copy=False))
    fields["dataset"] = torch.full((len(located),), -1)
    fields["structure_id"] = [read_text(arrays, "id", local) for arrays, local in located]
    codes = store.group_codes[np.asarray(positions, dtype=np.int64)].tolist()
    names = {code: read_text(store.index, "group", code) for code in set(codes)}
    fields["group"] = [names[code] for code in codes]
    return make_batch(fields, torch.tensor([stop - start for _, start, stop in spans]))
