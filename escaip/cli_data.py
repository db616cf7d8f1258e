"""The ``data`` commands of the command line, and the options of everything that reads data."""

from __future__ import annotations

import argparse
import json
from typing import Any

from escaip.errors import UsageError

# Spelled out, so that --help imports no reader; a test compares with escaip.data.readers.READERS.
_FORMATS = ("aselmdb", "ase", "mptrj", "oc20", "ocp_lmdb", "pyg", "pymatgen", "spice", "store", "xyz_zip")
_LABELS = ("energy", "forces", "stress", "virial", "charge", "spin", "group")


def add_data(commands: Any) -> None:
    """Adds ``data`` and its sub-commands."""
    parent = commands.add_parser("data", help="data sets: cards, inspection, conversion")
    actions = parent.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="data sets with a card")
    listing.set_defaults(command=_list)
    card = actions.add_parser("info", help="the card of a data set")
    card.add_argument("name", metavar="NAME")
    card.set_defaults(command=_card)
    download = actions.add_parser("download", help="the published files of a data set; resumes, checks")
    download.add_argument("name", metavar="NAME", help="a data set (escaip data list)")
    download.add_argument("--split", metavar="S", help="only files of this split")
    download.add_argument("--file", action="append", metavar="F", help="only these files, by name or pattern")
    download.add_argument("--root", metavar="DIR", help="folder of all data sets (default: $ESCAIP_DATA, else data)")
    download.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (default: 4)")
    download.add_argument("--extract", action="store_true", help="unpack archives")
    download.add_argument("--verify", action="store_true", help="compare checksums of files that are there again")
    download.add_argument("--dry-run", action="store_true", help="print files, sizes and free space, fetch nothing")
    download.set_defaults(command=_download)
    inspect = actions.add_parser("inspect", help="counts, ranges and distributions of any supported data")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--out", metavar="DIR", help="also write inspect.json and inspect.png there")
    add_source_options(inspect)
    inspect.set_defaults(command=_inspect)
    convert = actions.add_parser("convert", help="any supported data into extxyz or a prepared store")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST", help="ends in .extxyz (also .gz, .xz), or a folder for a store")
    _add_writing_options(convert)
    convert.set_defaults(command=_convert)
    prepare = actions.add_parser(
        "prepare", help="native files into a prepared store, in parallel; resumes after a kill"
    )
    prepare.add_argument(
        "name", metavar="NAME", help=f"a data set (escaip data list) or a layout: {', '.join(_FORMATS)}"
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="files, folders or patterns; train=PATH val=PATH ... for sets that come divided",
    )
    prepare.add_argument("--out", required=True, metavar="DIR")
    prepare.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    prepare.add_argument("--val", type=float, metavar="F", help="fraction, or number, of structures for validation")
    prepare.add_argument("--test", type=float, metavar="F", help="the same for testing")
    prepare.add_argument("--split-by", choices=("group", "structure"), default="group", help="what is never divided")
    prepare.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    prepare.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of forces and stress")
    prepare.add_argument("--restart", action="store_true", help="throw away unfinished work of other options")
    _add_writing_options(prepare, with_format=False)
    prepare.set_defaults(command=_prepare)


def add_source_options(parser: argparse.ArgumentParser, with_format: bool = True) -> None:
    """Adds how to read a file; see :func:`source_options`."""
    group = parser.add_argument_group("reading the data")
    if with_format:
        group.add_argument("--format", choices=_FORMATS, help="reader (default: from the file)")
    for label in _LABELS:
        group.add_argument(f"--{label}-key", metavar="KEY", help=f"name of the {label} in the file")
    group.add_argument("--units", metavar="Q=U,...", help="where not Å and eV: length=bohr,energy=hartree")
    group.add_argument("--set", action="append", metavar="K=V", help="option of the layout: energy=total, subset=...")
    group.add_argument("--max-force", type=float, metavar="F", help="leave out structures with a larger force, eV/Å")
    group.add_argument("--limit", type=int, metavar="N", help="use the first N structures")


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of :func:`escaip.data.open_source` that were given."""
    keys = {label: getattr(args, f"{label}_key") for label in _LABELS if getattr(args, f"{label}_key")}
    options = {
        "format": getattr(args, "format", None),
        "keys": keys,
        "units": _units(args.units),
        "max_force": args.max_force,
        "limit": args.limit,
    }
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit is {args.limit}: it must be at least 1")
    return {**_layout_options(args.set or []), **{name: value for name, value in options.items() if value}}


def _layout_options(settings: list[str]) -> dict[str, Any]:
    """``K=V`` pairs; a value that is JSON is that, anything else is text."""
    options: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UsageError(f"--set {text!r} is not understood: write energy=total")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _add_writing_options(parser: argparse.ArgumentParser, with_format: bool = True) -> None:
    add_source_options(parser, with_format)
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad structures and count them")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _units(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and unit for name, _, unit in pairs):
        raise UsageError(f"--units {text!r} is not understood: write length=bohr,energy=hartree")
    return {name.strip(): unit.strip() for name, _, unit in pairs}


def _list(args: argparse.Namespace) -> None:
    from escaip.files import list_datasets

    cards = list_datasets()
    width = max((len(card.name) for card in cards), default=0) + 2
    for card in cards:
        print(f"{card.name:<{width}}{card.title}")


def _card(args: argparse.Namespace) -> None:
    from escaip.files import dataset_card

    print(dataset_card(args.name).text)


def _download(args: argparse.Namespace) -> None:
    from escaip.data.download import download

    report = download(
        args.name,
        split=args.split,
        files=args.file,
        root=args.root,
        jobs=args.jobs,
        dry_run=args.dry_run,
        extract=args.extract,
        verify=args.verify,
    )
    print(report.table() if args.dry_run else report.summary())


def _inspect(args: argparse.Namespace) -> None:
    from escaip.data.commands import inspect
    from escaip.files import resolve

    inspect(resolve(args.path), out=args.out, **source_options(args))


def _convert(args: argparse.Namespace) -> None:
    from escaip.data.commands import convert
    from escaip.files import resolve

    report = convert(resolve(args.source), args.target, overwrite=args.overwrite, **_reading(args))
    print(report.summary())


def _prepare(args: argparse.Namespace) -> None:
    from escaip.data.prepare import prepare_named

    split = {"by": args.split_by, "val": args.val or 0, "test": args.test or 0}
    report = prepare_named(
        args.name,
        args.source,
        args.out,
        options=_reading(args),
        split=split if args.val or args.test else None,
        seed=args.seed,
        workers=args.workers,
        dtype=args.dtype,
        overwrite=args.overwrite,
        restart=args.restart,
        progress=True,
    )
    print(report.summary())


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {**source_options(args), "on_error": "skip" if args.skip_bad else "raise"}
