"""The ``scaling`` commands of the command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_scaling(commands: Any) -> None:
    """Adds ``scaling`` and its actions."""
    parser = commands.add_parser("scaling", help="scaling-law studies: how errors fall with size, data and compute")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_run(actions)
    parser = actions.add_parser("fit", help="exponents with intervals from the finished runs of a study")
    _add_fit_options(parser, "reads records.jsonl, writes fit.json")
    parser.set_defaults(command=_fit)
    parser = actions.add_parser("plot", help="the fits as one sheet of plots and a report")
    _add_fit_options(parser, "reads records.jsonl, writes report.md, scaling.png, scaling.pdf, fit.json")
    parser.set_defaults(command=_plot)


def _add_run(actions: Any) -> None:
    parser = actions.add_parser("run", help="the runs of a study; the same command again goes on where it was stopped")
    parser.add_argument("config", metavar="CONFIG", help="which runs: a file, or a recipe of configs/scaling by name")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes",
        help="settings of every run over those of CONFIG, such as data.train=train.xyz",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once on this machine (default: 1)")
    parser.add_argument(
        "--slurm", nargs="+", metavar="OPTION",
        help="submit the runs as a SLURM array; options of sbatch without dashes, such as gres=gpu:1 time=4:00:00",
    )  # fmt: skip
    parser.set_defaults(command=_run)


def _add_fit_options(parser: argparse.ArgumentParser, files: str) -> None:
    parser.add_argument("folder", metavar="DIR", help=f"of the study: {files}")
    parser.add_argument("--metric", default="forces_mae", metavar="NAME", help="of the records (default: forces_mae)")
    parser.add_argument(
        "--huber", type=float, default=1e-3, metavar="D",
        help="δ of Huber's loss in log L; 1 or more is least squares (default: 0.001)",
    )  # fmt: skip
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="refits for intervals (default: 1000)")
    parser.add_argument("--level", type=float, default=0.9, metavar="P", help="of intervals (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the refits (default: 0)")
    parser.add_argument("--no-floor", dest="floor", action="store_false", help="fix E = 0")


def _run(args: argparse.Namespace) -> int:
    from escaip.scaling.run import run_study

    slurm = None if args.slurm is None else [f"--{option}" for option in args.slurm]
    if run_study(args.config, args.out, changes=args.changes, workers=args.workers, slurm=slurm):
        print(f"complete: escaip scaling plot {args.out}")
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from escaip.scaling.laws import FitSettings

    return FitSettings(huber=args.huber, bootstrap=args.bootstrap, level=args.level, seed=args.seed, floor=args.floor)


def _fit(args: argparse.Namespace) -> int:
    from escaip.scaling.summary import FIT, fit_study

    print(fit_study(args.folder, args.metric, _settings(args)).summary())
    print(f"\nwrote {FIT} in {args.folder}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from escaip.scaling.document import write_report

    _, files = write_report(args.folder, args.metric, _settings(args))
    print("wrote " + ", ".join(str(file) for file in files))
    return 0
