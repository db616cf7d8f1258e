"""The command line: parse, call, print. What a command does lives in the modules it calls."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from escaip import __version__
from escaip.cli_analysis import add_analyze
from escaip.cli_data import add_data, add_source_options, source_options
from escaip.cli_options import add_model_options, model_options
from escaip.cli_properties import add_properties
from escaip.cli_scaling import add_scaling
from escaip.cli_select import add_select
from escaip.cli_simulate import add_md, add_relax
from escaip.cli_tune import add_tune
from escaip.errors import EscaipError, UsageError

TRAINING_COMMANDS = {
    "fit": "train a model from a configuration file (Lightning)",
    "validate": "errors of a checkpoint on the validation set of a configuration",
    "test": "errors of a checkpoint on the test set of a configuration",
    "predict": "predictions of a checkpoint for the prediction set of a configuration",
}


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line; abbreviated options are refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}: see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0 on success, 2 for a usage error, 130 after Ctrl-C, 1 otherwise.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with warnings.catch_warnings():
        if not debug:
            _plain_warnings()
        try:
            return _run(arguments)
        except SystemExit as stop:  # argparse: --help, --version, usage errors
            return _status(stop.code)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:  # the reader of a pipe, such as head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if debug:
                raise
            message, status = _explain(error)
            return _fail(message, status)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in TRAINING_COMMANDS:
        from escaip.train.cli import run

        return run(arguments)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    parsed = parser.parse_args(arguments)
    return int(parsed.command(parsed) or 0)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command, without importing what they need."""
    parser = _Parser(
        prog="escaip",
        description="Attention-based interatomic potentials: from data files to molecular dynamics.",
        epilog="--debug shows the traceback of an error and every warning.",
    )
    parser.add_argument("--version", action="version", version=f"escaip {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in TRAINING_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    add_data(commands)
    _add_evaluate(commands)
    add_relax(commands)
    add_md(commands)
    add_select(commands)
    add_properties(commands)
    add_analyze(commands)
    add_scaling(commands)
    _add_import(commands)
    _add_export(commands)
    add_tune(commands)
    _add_info(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="energy, force and stress errors of a model on labelled data")
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument("data", metavar="DATA", help="anything ASE reads, SPICE HDF5 or a prepared store")
    parser.add_argument(
        "--out", default="evaluation", metavar="DIR", help="where report and plots go (default: evaluation)"
    )
    parser.add_argument("--free-atoms", action="store_true", help="count forces of unconstrained atoms only")
    parser.add_argument(
        "--max-atoms", type=int, metavar="N", help="atoms evaluated at once (default: what pays and fits into memory)"
    )
    parser.add_argument("--no-plots", action="store_true", help="write the JSON report only")
    add_source_options(parser)
    add_model_options(parser)
    parser.set_defaults(command=_evaluate)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="a model of another program as one of this")
    programs = parser.add_subparsers(title="programs", metavar="PROGRAM", required=True)
    parser = programs.add_parser("fairchem", help="an EScAIP of fairchem-core")
    parser.add_argument("file", metavar="FILE", help="inference checkpoint (inference_ckpt.pt); no code in it is run")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .escaip file to write")
    parser.add_argument(
        "--distance-table", choices=("never", "inference", "always"), default="never",
        help="never computes what was published (default); the others are faster, equal to about 1e-7",
    )  # fmt: skip
    parser.set_defaults(command=_import_fairchem)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="a model in another format, or compiled ahead of time")
    parser.add_argument("model", metavar="MODEL", help=".ckpt or .escaip file")
    parser.add_argument(
        "--format", choices=("escaip", "aoti"), required=True,
        help="escaip: weights and description, for every machine; aoti: machine code beside them, for this one",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write; of aoti it ends in .pt2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of aoti (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision (default: as stored)")
    parser.set_defaults(command=_export)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what a model is; without a model, what this installation is")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=".ckpt or .escaip file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_info)


def _evaluate(args: argparse.Namespace) -> int:
    from escaip.evaluate.command import evaluate_files

    report = evaluate_files(
        args.model, args.data, args.out, free_atoms_only=args.free_atoms, max_atoms=args.max_atoms,
        plots=not args.no_plots, progress=sys.stderr.isatty(), **model_options(args), **source_options(args),
    )  # fmt: skip
    print(report.table())
    print(f"wrote {args.out}")
    return 0


def _import_fairchem(args: argparse.Namespace) -> int:
    from escaip.interop.fairchem import read_fairchem

    potential = read_fairchem(args.file, distance_table=args.distance_table)
    potential.save(args.out)
    sets = ", ".join(potential.metadata.datasets) or "no data set named"
    print(f"wrote {args.out}: {potential.config.forces} forces, {len(potential.metadata.elements)} elements, {sets}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from escaip.potential.export import check_request, export_model

    if check_request(args.out, args.format, args.device) == "aoti":
        print("compiling takes a minute or two", file=sys.stderr)
    print("\n".join(export_model(args.model, args.out, args.format, device=args.device, dtype=args.dtype)))
    return 0


def _info(args: argparse.Namespace) -> int:
    from escaip.info import describe_installation, describe_model, render

    description = describe_model(args.model) if args.model else describe_installation()
    print(render(description, as_json=args.json))
    return 0


def _plain_warnings() -> None:
    """Our warnings as one line each; those of other packages are for developers and not shown."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"escaip: warning: {_one_line(message)}", file=sys.stderr)

    warnings.showwarning = show  # restored by catch_warnings
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"escaip\b")


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit status for anything that can happen."""
    if isinstance(error, EscaipError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror.lower()}: check the path, its permissions and the space on the disk", 1
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: use a smaller structure, fewer atoms per batch, or --device cpu", 1
    return f"unexpected {type(error).__name__}: {error}: run again with --debug and report what it prints", 1


def _fail(message: str, status: int) -> int:
    print(f"escaip: error: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _status(code: Any) -> int:
    if code is None:
        return 0
    return code if isinstance(code, int) else 1
