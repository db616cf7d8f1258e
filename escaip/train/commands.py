"""The commands ``fit``, ``validate`` and ``test``: cheap checks first, then LightningCLI."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from escaip.errors import DataError
from escaip.files import model_file, resolve
from escaip.train.arguments import find_checkpoint, paths_of, prepare

_READ = {"fit": ("train", "val", "replay"), "validate": ("val", "replay"), "test": ("test",)}


def fit(arguments: list[str]) -> None:
    """Trains a model from a recipe or a configuration file, or resumes a run.

    Example: escaip fit --config quickstart --data.train train.extxyz
    """
    _run("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Computes the errors of a checkpoint on the validation set of a configuration.

    Example: escaip validate --config quickstart --ckpt_path best
    """
    _run("validate", arguments)


def test(arguments: list[str]) -> None:
    """Computes the errors of a checkpoint on the test set of a configuration.

    Example: escaip test --config spice_small --ckpt_path best
    """
    _run("test", arguments)


def _run(command: str, arguments: list[str]) -> None:
    _, _, settings = prepare([command, *arguments])
    for part in _READ[command]:
        for path in paths_of(settings.get(f"data.{part}")):
            text = os.path.expanduser(resolve(path))
            if not os.path.exists(text) and next(glob.iglob(text, recursive=True), None) is None:
                raise DataError(f"data.{part}: {text}: no such file or directory")
    if settings.get("ckpt_path") not in (None, "last", "best"):
        find_checkpoint(str(settings["ckpt_path"]), Path())
    start = settings.get("model.init_from", (settings.get("model") or {}).get("init_from"))
    if command == "fit" and start is not None and settings.get("ckpt_path") is None:
        model_file(start)
    from escaip.train.cli import run

    run([command, *arguments])
