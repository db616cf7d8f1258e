"""The ``scaling`` commands of the command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_scaling(commands: Any) -> None:
    """Adds ``scaling`` and its actions."""
    parser = commands.add_parser("scaling", help="scaling-law studies: how errors fall with size, data and compute")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_fit(actions)


def _add_fit(actions: Any) -> None:
    parser = actions.add_parser("fit", help="exponents with intervals from the finished runs of a study")
    parser.add_argument("folder", metavar="DIR", help="of the study: reads records.jsonl, writes fit.json")
    parser.add_argument("--metric", default="forces_mae", metavar="NAME", help="of the records (default: forces_mae)")
    parser.add_argument(
        "--huber", type=float, default=1e-3, metavar="D",
        help="δ of Huber's loss in log L; 1 or more is least squares (default: 0.001)",
    )  # fmt: skip
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="refits for intervals (default: 1000)")
    parser.add_argument("--level", type=float, default=0.9, metavar="P", help="of intervals (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the refits (default: 0)")
    parser.add_argument("--no-floor", dest="floor", action="store_false", help="fix E = 0")
    parser.set_defaults(command=_fit)


def _fit(args: argparse.Namespace) -> int:
    from escaip.scaling.laws import FitSettings
    from escaip.scaling.summary import FIT, fit_study

    settings = FitSettings(
        huber=args.huber, bootstrap=args.bootstrap, level=args.level, seed=args.seed, floor=args.floor
    )
    study = fit_study(args.folder, args.metric, settings)
    print(study.summary())
    print(f"\nwrote {FIT} in {args.folder}")
    return 0
