"""The attention backends, what each supports, and the choice of the fastest that serves a request."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from escaip.errors import ConfigError
from escaip.ops import cpp, library, triton
from escaip.ops.inputs import HALF_TYPES

_ANY_TYPE = (torch.float64, torch.float32, *HALF_TYPES)


@dataclass(frozen=True)
class BackendInfo:
    """A backend and its abilities.

    Attributes:
        name: what to pass as ``backend``.
        derivatives: how often it can be differentiated; None for any number of times.
        devices: device types it runs on; empty for every device.
        dtypes: dtypes of q, k and v.
        dropout: whether it drops attention weights in training.
        node_attention: whether it serves ``escaip.ops.node_attention`` too.
        angular_values: whether it multiplies values by angles.
        description: one line for tables.
    """

    name: str
    derivatives: int | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dropout: bool
    node_attention: bool
    angular_values: bool
    description: str

    def summary(self) -> str:
        """Describes it in one line, or says why it is not usable here."""
        reason = self.unusable_here()
        if reason is not None:
            return f"not usable here: {reason}"
        parts = [self.description, _derivatives(self.derivatives), "on " + (" and ".join(self.devices) or "any device")]
        parts.append(" ".join(_name(dtype) for dtype in self.dtypes))
        parts += [name for has, name in ((self.dropout, "dropout"), (self.node_attention, "node attention")) if has]
        return "; ".join(parts)

    def unusable_here(self) -> str | None:
        """Why this machine cannot run it and what would help, in one line; None where it can."""
        return _unusable(self.name)

    def refuses(self, request: Request) -> str | None:
        """Names the part of a request that it cannot do; None when it can do all."""
        if self.devices and request.device not in self.devices:
            return f"does not run on {request.device}"
        if request.dtype not in self.dtypes:
            return f"does not take {_name(request.dtype)}"
        if request.dropout and not self.dropout:
            return "has no dropout of attention weights"
        if request.node_attention and not self.node_attention:
            return "does no attention among all atoms of a system"
        if request.angular_values and not self.angular_values:
            return "has no angular values"
        if self.derivatives is not None and request.derivatives > self.derivatives:
            return f"has {_derivatives(self.derivatives)}, not {request.derivatives}"
        return None


@dataclass(frozen=True)
class Request:
    """Requirements of a call."""

    device: str
    dtype: torch.dtype
    derivatives: int
    dropout: bool
    node_attention: bool
    angular_values: bool


# Fastest first: "auto" takes the first that is usable and refuses nothing.
BACKENDS = (
    BackendInfo("triton", 2, ("cuda",), (torch.float32, *HALF_TYPES), False, True, True,
                "fused GPU kernels"),
    BackendInfo("native", 2, ("cpu",), _ANY_TYPE, False, False, True,
                "fused C++, compiled at first use"),
    BackendInfo("blocked", 2, (), _ANY_TYPE, False, True, True,
                "plain PyTorch in blocks of like sizes, memory linear in the tokens"),
    BackendInfo("dense", None, (), _ANY_TYPE, True, True, True,
                "plain PyTorch on padded matrices"),
    BackendInfo("sdpa", 1, (), _ANY_TYPE, False, True, False,
                "PyTorch's scaled_dot_product_attention on padded, expanded channels"),
    BackendInfo("xformers", 1, ("cuda",), (torch.float32, *HALF_TYPES), False, True, False,
                "xformers' memory-efficient attention on packed, expanded channels"),
    BackendInfo("reference", None, (), _ANY_TYPE, True, True, True,
                "plain PyTorch over pairs of tokens: the specification"),
)  # fmt: skip
_BY_NAME = {info.name: info for info in BACKENDS}


def available_backends() -> tuple[BackendInfo, ...]:
    """Returns the backends usable on this machine, each with what it supports."""
    return tuple(info for info in BACKENDS if info.unusable_here() is None)


def check_backend(name: str) -> None:
    """Raises ConfigError when ``name`` is neither ``"auto"`` nor a backend."""
    if name != "auto" and name not in _BY_NAME:
        raise ConfigError(f"attention backend {name!r} does not exist: choose auto, {', '.join(_BY_NAME)}")


def choose_backend(name: str, request: Request) -> BackendInfo:
    """The backend that serves a request.

    Raises:
        ConfigError: it does not exist, is not usable here or cannot do what is asked; names those that can.
    """
    check_backend(name)
    if name == "auto":
        for info in BACKENDS:
            if info.refuses(request) is None and info.unusable_here() is None:
                return info
        raise ConfigError(f"no attention backend can do what is asked: {_reasons(request)}")
    info = _BY_NAME[name]
    refused = info.refuses(request) or info.unusable_here()
    if refused is not None and not (name == "triton" and _interpreted(request)):
        able = [o.name for o in BACKENDS if o.refuses(request) is None and o.unusable_here() is None]
        raise ConfigError(f"attention backend {name!r} {refused}: choose auto, {', '.join(able)}")
    return info


def _interpreted(request: Request) -> bool:
    """Triton's interpreter runs the kernels on CPU tensors, slowly: for tests, asked for by name only."""
    on_gpu = dataclasses.replace(request, device="cuda")
    return _BY_NAME["triton"].refuses(on_gpu) is None and _unusable("triton") is None


@torch.compiler.assume_constant_result
def _unusable(name: str) -> str | None:
    return _look(name)


@functools.cache
def _look(name: str) -> str | None:
    if name == "native":
        return cpp.unavailable()
    if name == "triton":
        return triton.availability()
    return library.xformers_unusable() if name == "xformers" else None


def _reasons(request: Request) -> str:
    return "; ".join(f"{info.name} {info.refuses(request) or info.unusable_here()}" for info in BACKENDS)


def _derivatives(count: int | None) -> str:
    return "any derivative" if count is None else f"{count} derivative{'' if count == 1 else 's'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
