"""The commands that compute a property of a molecule or a crystal."""

from __future__ import annotations

import argparse
from typing import Any


def add_properties(commands: Any) -> None:
    """Adds ``vibrations``, ``eos``, ``elastic``, ``phonons`` and ``neb``."""
    _add_vibrations(commands)
    _add_eos(commands)
    _add_elastic(commands)
    _add_phonons(commands)
    _add_neb(commands)


def _add_vibrations(commands: Any) -> None:
    parser = _parser(commands, "vibrations", "harmonic frequencies and modes of a molecule", ("ions", "none"))
    parser.add_argument(
        "--finite-differences", action="store_true",
        help="of forces, for models whose forces are no derivatives (default: second derivatives)",
    )  # fmt: skip
    parser.add_argument("--step", type=float, default=0.01, metavar="A", help="of the differences (default: 0.01)")
    _finish(parser, "vibrations", ("relaxation", "fmax", "steps", "finite_differences", "step"))


def _add_eos(commands: Any) -> None:
    parser = _parser(commands, "eos", "energy over volume: V0, bulk modulus", ("full", "ions", "none"))
    parser.add_argument("--span", type=float, default=0.06, help="volumes within 1 ± SPAN of the first (default: 0.06)")
    parser.add_argument("--points", type=int, default=9, metavar="N", help="volumes (default: 9)")
    _finish(parser, "eos", ("relaxation", "fmax", "steps", "span", "points"))


def _add_elastic(commands: Any) -> None:
    parser = _parser(commands, "elastic", "elastic constants of a crystal", ("full", "ions", "none"))
    parser.add_argument("--strain", type=float, default=0.005, help="applied in both directions (default: 0.005)")
    parser.add_argument("--symprec", type=float, default=1e-3, metavar="A", help="of the symmetry (default: 0.001)")
    parser.add_argument(
        "--no-symmetry", dest="symmetrize", action="store_false", help="do not average over the crystal's symmetry"
    )
    _finish(parser, "elastic", ("relaxation", "fmax", "steps", "strain", "symprec", "symmetrize"))


def _add_phonons(commands: Any) -> None:
    parser = _parser(commands, "phonons", "phonon bands, density of states, free energy", ("full", "ions", "none"))
    parser.add_argument(
        "--supercell", type=int, nargs=3, metavar=("A", "B", "C"), help="repeats (default: what --min-length asks for)"
    )
    parser.add_argument("--min-length", type=float, default=12.0, metavar="A", help="of the supercell (default: 12)")
    parser.add_argument("--displacement", type=float, default=0.01, metavar="A", help="default: 0.01")
    parser.add_argument(
        "--hessian", action="store_true", help="second derivatives of the supercell instead of displaced atoms"
    )
    parser.add_argument("--mesh", type=float, default=60.0, metavar="A", help="length that sets q-points (default: 60)")
    parser.add_argument("--symprec", type=float, default=1e-4, metavar="A", help="of the symmetry (default: 0.0001)")
    names = ("relaxation", "fmax", "steps", "supercell", "min_length", "displacement", "hessian", "mesh", "symprec")
    _finish(parser, "phonons", names)


def _add_neb(commands: Any) -> None:
    parser = commands.add_parser("neb", help="minimum-energy path and barrier between two structures")
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument("structure", metavar="INITIAL", help="anything ASE reads")
    parser.add_argument("final", metavar="FINAL", help="the same atoms in the same order and cell")
    _add_relaxation(parser, ("ions", "none"), fmax=0.05, of="of the ends first")
    parser.add_argument("--images", type=int, default=5, metavar="N", help="between the ends (default: 5)")
    parser.add_argument("--spring", type=float, default=0.1, help="between images, eV/Å² (default: 0.1)")
    parser.add_argument("--optimizer", choices=("fire", "bfgs"), default="fire", help="default: fire")
    parser.add_argument("--no-climb", dest="climb", action="store_false", help="no climbing image")
    _finish(parser, "neb", ("relaxation", "fmax", "steps", "images", "spring", "optimizer", "climb"))


def _parser(commands: Any, name: str, text: str, relaxations: tuple[str, ...]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument("structure", metavar="STRUCTURE", help="anything ASE reads")
    _add_relaxation(
        parser, relaxations, fmax=1e-3, of="first: full is atoms and cell" if "full" in relaxations else "first"
    )
    return parser


def _add_relaxation(parser: argparse.ArgumentParser, choices: tuple[str, ...], fmax: float, of: str) -> None:
    parser.add_argument(
        "--relax", dest="relaxation", choices=choices, default=choices[0], help=f"{of} (default: {choices[0]})"
    )
    parser.add_argument(
        "--fmax", type=float, default=fmax, help=f"largest force at the end in eV/Å (default: {fmax:g})"
    )
    parser.add_argument("--steps", type=int, default=500, help="give up after so many (default: 500)")


def _finish(parser: argparse.ArgumentParser, name: str, settings: tuple[str, ...]) -> None:
    parser.add_argument("--frame", type=int, default=-1, help="which structure of the file (default: the last)")
    parser.add_argument("--out", default=name, metavar="DIR", help=f"where results and plots go (default: {name})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64",
        help="precision (default: float64, since small differences are what counts)",
    )  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="whose references, for a model trained on several sets")
    parser.set_defaults(command=_run, property=name, settings=settings)


def _run(args: argparse.Namespace) -> int:
    from escaip.properties.commands import property_files

    structures = [args.structure, *([args.final] if args.property == "neb" else [])]
    calculator = {name: getattr(args, name) for name in ("device", "dtype", "dataset")}
    settings = {name: getattr(args, name) for name in args.settings}
    result = property_files(
        args.property, args.model, structures, args.out, frame=args.frame, calculator=calculator, **settings
    )
    print(result.summary())
    print(f"wrote {args.out}")
    return 0
