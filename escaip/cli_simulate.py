"""The ``md`` and ``relax`` commands of the command line."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from escaip.cli_options import add_compile_option, add_model_options, model_options


def add_relax(commands: Any) -> None:
    """Adds ``relax``."""
    parser = commands.add_parser("relax", help="geometry optimisation")
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument("structure", metavar="STRUCTURE", help="anything ASE reads")
    parser.add_argument("--fmax", type=float, default=0.05, help="largest force at the end in eV/Å (default: 0.05)")
    parser.add_argument("--steps", type=int, default=500, help="give up after so many (default: 500)")
    parser.add_argument("--optimizer", choices=("bfgs", "fire"), default="bfgs", help="default: bfgs")
    parser.add_argument("--cell", action="store_true", help="relax the cell as well")
    parser.add_argument("--pressure", type=float, default=0.0, metavar="GPA", help="with --cell (default: 0)")
    parser.add_argument("--frame", type=int, default=-1, help="which structure of the file (default: the last)")
    parser.add_argument("--out", metavar="FILE", help="default: STRUCTURE's name with .relaxed.extxyz")
    add_model_options(parser)
    add_compile_option(parser)
    _add_calculator_options(parser)
    parser.set_defaults(command=_relax)


def add_md(commands: Any) -> None:
    """Adds ``md``."""
    parser = commands.add_parser("md", help="molecular dynamics with log, trajectory and restart")
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument("structure", metavar="STRUCTURE", help="anything ASE reads")
    parser.add_argument("--ensemble", choices=("nve", "nvt", "npt"), help="required, but for --check")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of the whole run, resumed parts included; required, but for --check"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="no run: compare forces and stress with differences of the energy, and symmetries, cutoff and "
        "conservation with what they must be, around STRUCTURE; --dtype float64 is recommended",
    )  # fmt: skip
    _add_run_options(parser)
    parser.add_argument("--frame", type=int, default=-1, help="which structure of the file (default: the last)")
    parser.add_argument(
        "--out", default="md.extxyz", metavar="FILE", help="trajectory, .extxyz, .traj or .h5 (default: md.extxyz)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its restart file")
    parser.add_argument("--overwrite", action="store_true", help="replace an unfinished run in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    add_model_options(parser)
    add_compile_option(parser)
    parser.add_argument(
        "--graph-skin", type=float, default=0.0, metavar="A",
        help="keep the graph while distances change by less: 0.3 for small systems on a GPU (default: 0)",
    )  # fmt: skip
    parser.add_argument("--cuda-graphs", action="store_true", help="with --compile, on CUDA: one launch per evaluation")
    _add_calculator_options(parser)
    parser.add_argument(
        "--max-spread", type=float, metavar="EVA",
        help="with --committee: stop where the members' forces on an atom differ by more, in eV/Å",
    )  # fmt: skip
    parser.add_argument(
        "--save-spread", type=float, metavar="EVA",
        help="with --committee: write frames above it, in eV/Å, to OUT.uncertain.extxyz and go on",
    )  # fmt: skip
    parser.set_defaults(command=partial(_md, parser))


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, metavar="K", help="required for nvt, npt and to draw velocities")
    parser.add_argument("--timestep", type=float, default=0.5, metavar="FS", help="default: 0.5")
    parser.add_argument("--pressure", type=float, metavar="GPA", help="npt only (default: 0)")
    parser.add_argument("--thermostat", choices=("langevin", "bussi", "nose-hoover"), help="nvt (default: langevin)")
    parser.add_argument("--thermostat-time", type=float, default=100.0, metavar="FS", help="default: 100")
    parser.add_argument("--barostat", choices=("isotropic", "full"), help="npt (default: isotropic)")
    parser.add_argument("--barostat-time", type=float, default=1000.0, metavar="FS", help="default: 1000")
    parser.add_argument(
        "--velocities", choices=("auto", "draw", "keep"), default="auto",
        help="auto keeps those in the file and draws them where there are none (default)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of velocities and thermostat (default: 0)")
    parser.add_argument("--interval", type=int, default=10, metavar="N", help="steps between log lines (default: 10)")
    parser.add_argument("--trajectory-interval", type=int, metavar="N", help="default: as --interval")
    parser.add_argument("--restart-interval", type=int, default=1000, metavar="N", help="default: 1000")


def _add_calculator_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--committee", nargs="+", default=[], metavar="MODEL",
        help="further members beside MODEL: their mean is used, their spread is known",
    )  # fmt: skip
    parser.add_argument(
        "--d3", metavar="FUNCTIONAL",
        help="add D3 dispersion with this functional's parameters, pbe for instance; not to a model trained with it",
    )  # fmt: skip
    parser.add_argument(
        "--d3-damping", choices=("bj", "zero", "bjm", "zerom", "op"), default="bj", help="damping (default: bj)"
    )


def _calculator_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("compile", "committee", "d3", "d3_damping")
    return {**model_options(args), **{name: getattr(args, name) for name in names}}


def _relax(args: argparse.Namespace) -> int:
    from escaip.simulate.commands import relax_file

    result, written = relax_file(
        args.model, args.structure, fmax=args.fmax, steps=args.steps, optimizer=args.optimizer, cell=args.cell,
        pressure=args.pressure, frame=args.frame, out=args.out, **_calculator_options(args),
    )  # fmt: skip
    print(result.summary())
    print(f"wrote {written}")
    return 0


def _md(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.check:
        return _check(args)
    missing = [f"--{name}" for name in ("ensemble", "steps") if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    from escaip.simulate.commands import md_file

    result = md_file(
        args.model, args.structure, frame=args.frame, out=args.out, resume=args.resume, overwrite=args.overwrite,
        quiet=args.quiet, graph_skin=args.graph_skin, cuda_graphs=args.cuda_graphs, **_calculator_options(args),
        ensemble=args.ensemble, steps=args.steps,
        temperature=args.temperature, timestep=args.timestep, pressure=args.pressure, thermostat=args.thermostat,
        thermostat_time=args.thermostat_time, barostat=args.barostat, barostat_time=args.barostat_time,
        velocities=args.velocities, seed=args.seed, log_interval=args.interval,
        trajectory_interval=args.trajectory_interval or args.interval, restart_interval=args.restart_interval,
        max_spread=args.max_spread, save_spread=args.save_spread,
    )  # fmt: skip
    print(result.summary())
    return 0


def _check(args: argparse.Namespace) -> int:
    from escaip.simulate.commands import check_file

    report = check_file(
        args.model, args.structure, frame=args.frame, seed=args.seed, temperature=args.temperature,
        graph_skin=args.graph_skin, cuda_graphs=args.cuda_graphs, **_calculator_options(args),
    )  # fmt: skip
    print(report.table())
    report.raise_failed()
    return 0
