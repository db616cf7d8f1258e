"""The ``escaip data`` commands."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from escaip.errors import UsageError
from escaip.options import DataPath, ReadOptions


def list_cards() -> None:
    """Lists the data sets that have a card.

    Example: escaip data list
    """
    from escaip.files import aligned, list_datasets

    print("\n".join(aligned([(card.name, card.title) for card in list_datasets()])))


def info(name: str) -> None:
    """Prints the card of a data set: origin, licence, level of theory, files, how to prepare it.

    Args:
        name: a data set of escaip data list

    Example: escaip data info spice
    """
    from escaip.files import dataset_card

    print(dataset_card(name).text)


def download(
    name: str,
    *,
    split: str | None = None,
    file: list[str] | None = None,
    root: str | None = None,
    jobs: int = 4,
    extract: bool = False,
    verify: bool = False,
    dry_run: bool = False,
) -> None:
    """Downloads the published files of a data set; an interrupted download goes on where it stopped.

    Args:
        name: a data set of escaip data list
        split: only the files of this split
        file: only these files, by name or pattern
        root: folder of all data sets (default: $ESCAIP_DATA, else data)
        jobs: files at a time
        extract: unpack archives
        verify: compare checksums of files that are there already
        dry_run: print files, sizes and free space, and fetch nothing

    Example: escaip data download mptrj --dry-run
    """
    from escaip.files import dataset_card

    card = dataset_card(name)  # a wrong name is told before anything heavy is imported
    from escaip.data.download import download as fetch

    print(fetch(card, split=split, files=file, root=root, jobs=jobs, dry_run=dry_run, extract=extract, verify=verify))


def inspect(path: DataPath, *, out: str | None = None, **read: Unpack[ReadOptions]) -> None:
    """Prints counts, ranges and distributions of any supported data.

    Args:
        path: a file or folder
        out: folder for inspect.json and inspect.png

    Example: escaip data inspect train.extxyz --keys.energy REF_energy
    """
    from escaip.data.inspect import inspect as inspect_path
    from escaip.files import resolve

    inspect_path(resolve(path), out=out, **reading(**read))


def convert(
    source: DataPath, target: str, *, skip_bad: bool = False, overwrite: bool = False, **read: Unpack[ReadOptions]
) -> None:
    """Converts any supported data into extxyz or a prepared store.

    Args:
        source: a file or folder
        target: a name that ends in .extxyz (also .gz, .xz), or a folder for a prepared store
        skip_bad: leave out bad structures and count them
        overwrite: replace what is there

    Example: escaip data convert sample.hdf5 sample.extxyz
    """
    from escaip.data.convert import convert as convert_path
    from escaip.files import resolve

    on_error = "skip" if skip_bad else "raise"
    report = convert_path(resolve(source), target, overwrite=overwrite, on_error=on_error, **reading(**read))
    print(f"{target}: {report.summary()}")


def prepare(
    name: str,
    source: list[str],
    *,
    out: str,
    workers: int = 1,
    val: float = 0.0,
    test: float = 0.0,
    split_by: Literal["group", "structure"] = "group",
    seed: int = 0,
    dtype: Literal["float64", "float32"] = "float64",
    skip_bad: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    **read: Unpack[ReadOptions],
) -> None:
    """Converts native files into a prepared store, in parallel; a killed preparation goes on where it stopped.

    Args:
        name: a data set of escaip data list, or a layout
        source: files, folders or patterns; train=PATH val=PATH for sets that come divided
        out: folder of the store
        workers: processes
        val: fraction, or number, of structures for validation
        test: fraction, or number, of structures for testing
        split_by: what is never divided between splits
        seed: seed of the split
        dtype: precision of forces and stress in the store
        skip_bad: leave out bad structures and count them
        overwrite: replace what is there
        restart: throw away unfinished work that used other options

    Example: escaip data prepare spice SPICE-2.0.1.hdf5 --out stores/spice --workers 8 --val 0.05
    """
    from escaip.data.prepare import prepare_named

    if "format" in read:
        raise UsageError("--format does not belong to prepare: give the layout as NAME")
    report = prepare_named(
        name, source, out, options={**reading(**read), "on_error": "skip" if skip_bad else "raise"},
        split={"by": split_by, "val": val, "test": test} if val or test else None,
        seed=seed, workers=workers, dtype=dtype, overwrite=overwrite, restart=restart, progress=True,
    )  # fmt: skip
    print(report.summary())


def reading(**read: Any) -> dict[str, Any]:
    """Returns the options of ``escaip.data.open_source`` that ``ReadOptions`` ask for.

    Raises:
        UsageError: a limit below 1.
    """
    if read.get("limit", 1) < 1:
        raise UsageError(f"--limit is {read['limit']}: it must be at least 1")
    return {**read.pop("set", {}), **read}
