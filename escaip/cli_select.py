"""The ``select`` command of the command line."""

from __future__ import annotations

import argparse
from typing import Any

from escaip.cli_options import add_model_options, model_options


def add_select(commands: Any) -> None:
    """Adds ``select``."""
    parser = commands.add_parser("select", help="frames to label next, by what a committee disagrees on")
    parser.add_argument("trajectory", metavar="TRAJECTORY", help="anything ASE reads")
    parser.add_argument(
        "--committee", nargs="+", required=True, metavar="MODEL", help="two or more .ckpt or .escaip files"
    )
    parser.add_argument("--count", type=int, required=True, metavar="N", help="frames to choose, at most")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="ends in .extxyz; a .json of spreads goes beside it"
    )
    parser.add_argument("--min-spread", type=float, default=0.0, metavar="EVA", help="in eV/Å (default: 0)")
    parser.add_argument(
        "--max-spread", type=float, metavar="EVA", help="in eV/Å: above it frames are broken, not new (default: none)"
    )
    parser.add_argument(
        "--min-distance", type=float, default=0.005, metavar="EV",
        help="frames nearer to a chosen one are duplicates: difference of atomic energies (default: 0.005)",
    )  # fmt: skip
    parser.add_argument("--every", type=int, default=1, metavar="N", help="look at every N-th frame (default: 1)")
    parser.add_argument("--max-atoms", type=int, metavar="N", help="atoms evaluated at once (default: what pays)")
    add_model_options(parser)
    parser.set_defaults(command=_select)


def _select(args: argparse.Namespace) -> int:
    import sys

    from escaip.simulate.selection import select_file

    selection = select_file(
        args.trajectory, args.committee, args.out, count=args.count, min_spread=args.min_spread,
        max_spread=args.max_spread, min_distance=args.min_distance, every=args.every, max_atoms=args.max_atoms,
        progress=sys.stderr.isatty(), **model_options(args),
    )  # fmt: skip
    print(selection.summary())
    return 0
