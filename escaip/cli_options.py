"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds where and in which precision a model runs; see :func:`model_options`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision (default: as stored)")
    parser.add_argument(
        "--precision", choices=("highest", "tf32", "float16", "bfloat16"), default="highest",
        help="of matrix products, for speed on GPUs; costs digits (default: highest, that of --dtype)",
    )  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="whose references, for a model trained on several sets")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what :func:`add_model_options` asked for."""
    return {name: getattr(args, name) for name in ("device", "dtype", "precision", "dataset")}


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--compile``."""
    parser.add_argument(
        "--compile", action="store_true",
        help="compile the model, a minute once per configuration and machine: for more than some hundred steps",
    )  # fmt: skip
