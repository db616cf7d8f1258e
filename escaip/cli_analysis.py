"""The ``analyze`` command of the command line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

# Spelled out, so that --help imports nothing; a test compares with escaip.analysis.settings.QUANTITIES.
_QUANTITIES = ("rdf", "msd", "vacf", "density", "temperature", "pressure", "drift")


def add_analyze(commands: Any) -> None:
    """Adds ``analyze``."""
    parser = commands.add_parser("analyze", help="structure, diffusion, vibrations and averages of a trajectory")
    parser.add_argument("trajectory", metavar="TRAJECTORY", help=".h5, .traj, .extxyz, or anything else ASE reads")
    parser.add_argument(
        "--quantities", metavar="Q,Q,...",
        help=f"some of {', '.join(_QUANTITIES)} (default: all that the trajectory allows)",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="analysis", metavar="DIR", help="where analysis.json and plots go (default: analysis)"
    )
    parser.add_argument(
        "--timestep", type=float, metavar="FS", help="between frames of the file, where it does not say"
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first frame, from 0 (default: 0)")
    parser.add_argument("--stop", type=int, metavar="N", help="frame to stop before (default: the end)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="so many frames on (default: 1)")
    parser.add_argument("--log", metavar="FILE", help="log of the run (default: the .csv beside TRAJECTORY)")
    parser.add_argument(
        "--rmax", type=float, metavar="A", help="of rdf (default: half the smallest width of the cell, at most 10)"
    )
    parser.add_argument("--bin-width", type=float, default=0.05, metavar="A", help="of rdf (default: 0.05)")
    parser.add_argument(
        "--fit", type=float, nargs=2, metavar=("FROM", "TO"),
        help="lags in fs that diffusion is fitted between (default: 0.1 to 0.5 of a block)",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=5, metavar="N", help="for the error of diffusion (default: 5)")
    parser.add_argument("--no-unwrap", action="store_true", help="msd: take positions as they are")
    parser.add_argument("--keep-drift", action="store_true", help="msd: keep the motion of the center of mass")
    parser.add_argument(
        "--vacf-length", type=float, metavar="FS", help="longest lag of vacf (default: half, at most 5000)"
    )
    parser.add_argument("--no-mass-weights", action="store_true", help="vacf: a spectrum in which atoms count alike")
    parser.add_argument("--no-plots", action="store_true", help="write analysis.json only")
    parser.set_defaults(command=_analyze)


def _analyze(args: argparse.Namespace) -> int:
    from escaip.analysis.command import analyze_file

    quantities = None if args.quantities is None else tuple(name for name in args.quantities.split(",") if name)
    analysis = analyze_file(
        args.trajectory, args.out, plots=not args.no_plots, progress=sys.stderr.isatty(), quantities=quantities,
        start=args.start, stop=args.stop, every=args.every, timestep=args.timestep, log=args.log, r_max=args.rmax,
        bin_width=args.bin_width, fit=None if args.fit is None else tuple(args.fit), num_blocks=args.blocks,
        unwrap=not args.no_unwrap, remove_drift=not args.keep_drift, vacf_length=args.vacf_length,
        mass_weighted=not args.no_mass_weights,
    )  # fmt: skip
    print(analysis.table())
    print(f"wrote {args.out}")
    return 0
