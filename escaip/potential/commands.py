"""The ``export`` command."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Literal

from escaip.options import ModelFile


def export(
    model: ModelFile,
    *,
    format: Literal["escaip", "aoti"],
    out: str,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    licence: str | None = None,
    citation: list[str] | None = None,
) -> None:
    """Writes a model in another format, or compiled ahead of time.

    Args:
        model: a model file
        format: escaip is weights and description, for every machine; aoti adds machine code, for this one
        out: the file to write; for aoti its name ends in .pt2
        device: device of the machine code, aoti only (default: cpu)
        dtype: precision (default: as stored)
        licence: stated in the file (default: as stored)
        citation: works to cite, stated in the file (default: as stored)

    Example: escaip export runs/quickstart/latest/best.ckpt --format escaip --out model.escaip
    """
    from escaip.potential.export import check_request, export_model
    from escaip.potential.loading import read_potential

    check_request(out, format, device)
    if format == "aoti":
        print("compiling takes a minute or two", file=sys.stderr)
    potential = read_potential(model)
    given = {"licence": licence, "citation": citation}
    card = {name: value for name, value in given.items() if value is not None}
    potential.set_metadata(replace(potential.metadata, provenance={**potential.metadata.provenance, **card}))
    print("\n".join(export_model(potential, out, format, device=device, dtype=dtype)))
