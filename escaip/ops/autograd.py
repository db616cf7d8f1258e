"""Attention as registered PyTorch operators: value, first and second derivative, each an operator of its own.

The operators of a backend are ``escaip::attention_<backend>``, ``…_backward`` and ``…_double_backward``. They are
opaque to ``torch.compile``, which sees shapes only. Those of ``native`` are in C++ (``cpp/binding.cpp``); behind the
others are the three functions of a module (``escaip.ops.inputs.KernelBackend``). A third derivative is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.inputs import AttentionInputs, AttentionOutputs, Gradients, KernelBackend, accumulation_dtype

_Function = Callable[..., Any]
KERNEL_BACKENDS = ("blocked", "native", "triton")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_envelope, Tensor? direction, Tensor query_offsets, Tensor key_offsets"
)
_CONSTANTS = "int[] widths, float scale, bool angular_values"
_SCHEMAS = {
    "": f"({_INPUTS}, {_CONSTANTS}) -> (Tensor, Tensor)",
    "_backward": (
        f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_CONSTANTS}, bool with_direction)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "_double_backward": (
        f"(Tensor tq, Tensor tk, Tensor tv, Tensor? tb, Tensor? tn, Tensor grad_out, {_INPUTS}, Tensor out, "
        f"Tensor lse, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


# The three functions of a backend, where its package has other names inside.
_MODULES = {"triton": "triton.launch"}


class _Operators:
    """The three operators of one backend; arguments are the fields of ``AttentionInputs``, in their order."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        name = f"escaip::attention_{backend}"
        fakes: tuple[_Function, ...] = (_fake_value, _fake_backward, _fake_double_backward)
        functions: tuple[_Function, ...] = (self.run, self.run_backward, self.run_double_backward)
        for (suffix, schema), function, fake in zip(_SCHEMAS.items(), functions, fakes, strict=True):
            torch.library.define(name + suffix, schema, tags=(torch.Tag.pt2_compliant_tag,))
            if backend != "native":
                torch.library.impl(name + suffix, "default", function)
            torch.library.register_fake(name + suffix, fake)
        packet = torch.ops.escaip
        self.value, self.backward, self.double_backward = (
            getattr(packet, f"attention_{backend}{suffix}").default for suffix in _SCHEMAS
        )
        torch.library.register_autograd(name, self.differentiate, setup_context=_keep)
        torch.library.register_autograd(
            f"{name}_backward", self.differentiate_backward, setup_context=_keep_for_second_derivative
        )
        torch.library.register_autograd(f"{name}_double_backward", self.refuse, setup_context=_keep_nothing)

    @property
    def module(self) -> KernelBackend:
        return cast(KernelBackend, importlib.import_module(f"escaip.ops.{_MODULES.get(self.backend, self.backend)}"))

    def run(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The attended values and the log of the softmax normaliser, which carries no gradient."""
        with _full_precision(inputs[0]):
            return self.module.forward(_attention_inputs(inputs))

    def run_backward(self, grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, log envelope and direction; empty tensors stand for None."""
        *tensors, out, lse, widths, scale, angular_values, with_direction = rest
        inputs = _attention_inputs((*tensors, widths, scale, angular_values))
        with _full_precision(grad_out):
            found = self.module.backward(inputs, AttentionOutputs(out, lse), grad_out, with_direction)
        return _without_none(found)

    def run_double_backward(self, tq: Tensor, tk: Tensor, tv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Gradients of ``grad_out`` and of the inputs for cotangents of the results of ``run_backward``."""
        tb, tn, grad_out, *tensors, out, lse, widths, scale, angular_values = rest
        inputs = _attention_inputs((*tensors, widths, scale, angular_values))
        tangents = Gradients(tq, tk, tv, tb, tn)
        with _full_precision(grad_out):
            to_grad_out, found = self.module.double_backward(inputs, AttentionOutputs(out, lse), grad_out, tangents)
        return to_grad_out, *_without_none(found)

    def differentiate(self, ctx: Any, grad_out: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: with recomputation each is given out once
        log_envelope, direction = saved[3:5]
        with_direction = direction is not None and ctx.needs_input_grad[4]
        dq, dk, dv, db, dn = self.backward(grad_out, *saved, *ctx.constants, with_direction)
        geometry = (None if log_envelope is None else db, dn if with_direction else None)
        return dq, dk, dv, *geometry, *(None,) * 5

    def differentiate_backward(self, ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved, (tq, tk, tv, tb, tn) = ctx.saved_tensors, cotangents
        log_envelope, direction = saved[4:6]
        g_out, gq, gk, gv, gb, gn = self.double_backward(
            tq, tk, tv, None if log_envelope is None else tb, tn if ctx.with_direction else None, *saved, *ctx.constants
        )
        geometry = (None if log_envelope is None else gb, None if direction is None else gn)
        # out and lse are functions of the others: the gradients include what passes through them.
        return g_out, gq, gk, gv, *geometry, *(None,) * 8

    def refuse(self, ctx: Any, *_: Any) -> NoReturn:
        raise ConfigError(
            f"attention backend {self.backend!r} has two derivatives, and a third was asked for: "
            "use backend='reference' or 'dense' (attention_backend in the model's config)"
        )


def _attention_inputs(arguments: Any) -> AttentionInputs:
    *tensors, widths, scale, angular_values = arguments
    q, k, v, log_envelope, direction, query_offsets, key_offsets = tensors
    offsets = (query_offsets, key_offsets)
    return AttentionInputs(q, k, v, log_envelope, direction, *offsets, tuple(widths), scale, angular_values)


def _fake_value(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))


def _fake_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, log_envelope, direction = rest[:5]
    return _fake_gradients(q, k, v, log_envelope, direction if rest[-1] else None)


def _fake_double_backward(tq: Tensor, tk: Tensor, tv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _like(rest[2]), *_fake_gradients(*rest[3:8])


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, *geometry: Tensor | None) -> tuple[Tensor, ...]:
    db, dn = (None if x is None else _like(x) for x in geometry)
    return _without_none(Gradients(_like(q), _like(k), _like(v), db, dn))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.constants = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _keep_for_second_derivative(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.constants, ctx.with_direction = inputs[10:13], inputs[13]


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _full_precision(x: Tensor) -> torch.autocast:
    """Inside a kernel the dtypes are settled: autocast must not round its sums."""
    return torch.autocast(x.device.type, enabled=False)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _without_none(gradients: Gradients) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for none."""
    return tuple(gradients.q.new_empty(0) if x is None else x for x in gradients)


OPERATORS = {backend: _Operators(backend) for backend in KERNEL_BACKENDS}
