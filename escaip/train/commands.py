"""The commands ``fit``, ``validate`` and ``test``, which LightningCLI parses."""

from __future__ import annotations


def fit(arguments: list[str]) -> None:
    """Trains a model from a recipe or a configuration file.

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
    from escaip.train.cli import run

    run([command, *arguments])
