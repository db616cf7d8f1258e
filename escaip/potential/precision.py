"""Precision of matrix products, set around an evaluation and restored afterwards (docs/howto/speed.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from escaip.errors import ConfigError

PRECISIONS = ("highest", "tf32", "float16", "bfloat16")
_HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Half precision of products of tokens; PyTorch's own autocast is off meanwhile.
_rounded: ContextVar[torch.dtype | None] = ContextVar("escaip_rounded", default=None)


@contextlib.contextmanager
def in_precision(name: str, device: torch.device) -> Iterator[torch.dtype | None]:
    """Sets the precision of evaluations within the context.

    PyTorch's autocast is switched off: it would also round per-atom products and derivatives, and compile anew.
    Products and attention of tokens are rounded to the half precision of ``name``, or else to that of an autocast
    around the context.

    Args:
        name: of ``PRECISIONS``; ``"highest"`` rounds only under an autocast.
        device: of the evaluation.

    Yields:
        The half precision, or None where nothing is rounded.
    """
    around = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else _rounded.get()
    rounded = _HALF_TYPES.get(name, around)
    token = _rounded.set(rounded)
    try:
        with torch.autocast(device.type, enabled=False), _tf32() if name == "tf32" else contextlib.nullcontext():
            yield rounded
    finally:
        _rounded.reset(token)


def check_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError for a precision that is unknown, or unavailable for this dtype or device."""
    given = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} does not exist: choose {', '.join(PRECISIONS)}")
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"a model with weights in {given} is not supported: use float32, and precision {given!r}")
    if name != "highest" and dtype != torch.float32:
        raise ConfigError(f"precision {name!r} is for float32 models, and this one is {given}: use dtype float32")
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision 'tf32' exists on CUDA devices, and the model is on {device.type}: use 'highest'")


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Lets CUDA multiply float32 matrices in TF32."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, "fp32_precision", None)  # of PyTorch from 2.9 on
    if before == "tf32" or (before is None and matmul.allow_tf32):
        yield
        return
    matmul.allow_tf32 = True  # sets fp32_precision as well; the other way round, reading this one would raise
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        if before is not None:
            matmul.fp32_precision = before


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns a device by name; ``"auto"`` takes CUDA where there is one.

    Raises:
        ConfigError: it does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} does not exist: choose auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but this machine has no usable CUDA: choose auto or cpu")
    return chosen


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Returns the dtype of a model by name, ``float32`` or ``float64``.

    Raises:
        ConfigError: another one.
    """
    choices = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in choices:
        hint = f", with precision {name} for the products" if name in PRECISIONS else ""
        raise ConfigError(f"dtype {name!r} is not supported: choose {' or '.join(choices)}{hint}")
    return choices[name]
