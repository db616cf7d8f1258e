"""The ``tune`` command of the command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_tune(commands: Any) -> None:
    """Adds ``tune``."""
    parser = commands.add_parser("tune", help="tile sizes of the attention kernels, measured on this GPU and kept")
    parser.add_argument("--model", metavar="FILE", help=".ckpt or .escaip file whose attention is measured, or")
    parser.add_argument("--preset", metavar="NAME", help="a size by name (default: 5m)")
    parser.add_argument(
        "--precision", nargs="+", choices=("highest", "tf32", "float16", "bfloat16"), default=["highest"],
        help="of matrix products, one or more, as the model will run (default: highest)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="for all of it (default: 120)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that compile (default: one per core, up to 16)"
    )
    parser.add_argument("--out", metavar="FILE", help="where to write (default: the user's cache, which is read)")
    parser.add_argument("--show", action="store_true", help="print what is measured for this GPU, and measure nothing")
    parser.set_defaults(command=_tune)


def _tune(args: argparse.Namespace) -> int:
    from functools import partial

    from escaip.tune import tiles_here, tune_model

    if args.show:
        print(tiles_here())
        return 0
    records = tune_model(
        args.model, args.preset, args.precision, args.seconds, args.workers, args.out, partial(print, flush=True)
    )
    measured = [record for record in records if record.best_ms is not None]
    better = sum(record.best != record.default for record in measured)
    print(f"{len(measured)} of {len(records)} measured, {better} faster with another tile than the table's")
    return 0
