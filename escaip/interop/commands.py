"""The ``escaip import`` commands."""

from __future__ import annotations

from typing import Literal

from escaip.options import DataPath


def fairchem(file: DataPath, *, out: str, distance_table: Literal["never", "inference", "always"] = "never") -> None:
    """Imports an EScAIP checkpoint of fairchem-core; no code in the file is run.

    Args:
        file: an inference checkpoint (inference_ckpt.pt)
        out: the .escaip file to write
        distance_table: never computes what was published; the others are faster, and equal to about 1e-7

    Example: escaip import fairchem inference_ckpt.pt --out model.escaip
    """
    from escaip.interop.fairchem import read_fairchem

    potential = read_fairchem(file, distance_table=distance_table)
    potential.save(out)
    sets = ", ".join(potential.metadata.datasets) or "no data set named"
    forces = "conservative" if potential.config.is_conservative else "direct"
    print(f"wrote {out}: {forces} forces, {len(potential.metadata.elements)} elements, {sets}")
