"""The kernel backend: value and two derivatives on packed tokens (``escaip.ops.inputs.KernelBackend``).

No step waits for the GPU: the host knows shapes alone, so that everything can be captured in a CUDA graph, once the
tiles were chosen (at the first call for a shape, outside of captures). PyTorch sums over heads and over the two halves
of the directions' gradient in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from escaip.ops.inputs import AttentionInputs, AttentionOutputs, Gradients
from escaip.ops.triton.backward import backward_columns, backward_rows
from escaip.ops.triton.common import Chunks, cut, size_class
from escaip.ops.triton.double_backward import double_backward_columns, double_backward_rows
from escaip.ops.triton.forward import forward_rows

# Up to this mean size one program serves a whole neighborhood of tokens; systems of atoms, whose sizes differ, are cut.
WHOLE = 128


@dataclass(frozen=True)
class _Launcher:
    """Contiguous inputs and constants, common to all kernels.

    Attributes:
        tensors: arguments of every kernel by name.
        scale: factor on the products of queries and keys.
        turned: whether values have angles.
        logits: chunks of q and k.
        values: chunks of v.
        precision: rounding of float32 matrix products, in Triton's words.
    """

    tensors: dict[str, Tensor | None]
    scale: float
    turned: bool
    logits: Chunks
    values: Chunks
    precision: str

    @classmethod
    def of(cls, inputs: AttentionInputs) -> _Launcher:
        names = ("q", "k", "v", "log_envelope", "direction", "query_offsets", "key_offsets")
        given = {name: getattr(inputs, name) for name in names}
        contiguous = {name: None if x is None else x.contiguous() for name, x in given.items()}
        turned = inputs.angular_values and inputs.direction is not None
        logits = cut(tuple(inputs.widths))
        chunks = logits, logits if turned else cut((inputs.q.shape[2],))
        return cls(contiguous, inputs.scale, turned, *chunks, matmul_precision(inputs.q))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def launch(self, kernel: Any, by_key: bool, **arguments: Any) -> None:
        """Runs a kernel over all tiles of queries, or of keys."""
        q, k, bias = self["q"], self["k"], self.tensors["log_envelope"]
        own, other = (k, q) if by_key else (q, k)
        neighborhoods = self["query_offsets"].shape[0] - 1
        own_mean, other_mean = own.shape[0] / neighborhoods, other.shape[0] / neighborhoods
        split = bias is None or own_mean > WHOLE

        def grid(constants: dict[str, Any]) -> tuple[int, int]:
            return own.shape[0] // constants["OWN"] * split + neighborhoods, q.shape[1]

        with torch.cuda.device_of(q):
            kernel[grid](
                **self.tensors, **arguments, neighborhoods=neighborhoods, scale=self.scale, H=q.shape[1], D=q.shape[2],
                LOGITS=self.logits, VALUES=self.values, ANGLES=self.tensors["direction"] is not None,
                TURNED=self.turned, BIAS=bias is not None, SPLIT=split, PRECISION=self.precision,
                OWN_SIZE=size_class(own_mean), OTHER_SIZE=size_class(other_mean),
            )  # fmt: skip

    @property
    def nothing(self) -> bool:
        """Whether there is no pair, hence nothing to run."""
        return self["q"].shape[0] == 0 or self["k"].shape[0] == 0

    def gradients(self, with_direction: bool) -> tuple[Gradients, Tensor | None, Tensor | None]:
        """Memory for gradients of q, k and v, and for the parts of the other two.

        Returns:
            gradients, of q and k zero where channels take no part in the logits; each head's share of that of the log
            envelope, ``(h, T)``; and the shares of rows and columns in that of the direction, ``(2, h, T, 3)``.
        """
        q, k, v = self["q"], self["k"], self["v"]
        whole = sum(chunk[1] for chunk in self.logits) == q.shape[2]
        empty, empty_like = (torch.zeros, torch.zeros_like) if self.nothing else (torch.empty, torch.empty_like)
        of_logits = empty_like if whole else torch.zeros_like
        shape = (k.shape[1], k.shape[0])
        bias = None if self.tensors["log_envelope"] is None else empty(shape, dtype=torch.float32, device=k.device)
        turn = None
        if with_direction and self.tensors["direction"] is not None:
            turn = empty((2, *shape, 3), dtype=torch.float32, device=k.device)
        return Gradients(of_logits(q), of_logits(k), empty_like(v), None, None), bias, turn


def matmul_precision(x: Tensor) -> str:
    """How products of float32 tiles are taken for tensors like ``x``.

    Three TF32 products keep float32's digits on tensor cores; one where the user allows PyTorch as much. Float16
    tensors meet float32 tiles too, which TF32 rounds as float16 would.
    """
    if torch.version.hip or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "ieee"
    exact = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def forward(inputs: AttentionInputs) -> AttentionOutputs:
    """See ``escaip.ops.inputs.KernelBackend``."""
    launcher = _Launcher.of(inputs)
    out = torch.empty_like(launcher["q"])
    lse = out.new_empty(out.shape[:2], dtype=torch.float32)
    if launcher.nothing:
        return AttentionOutputs(out.zero_(), lse.zero_())
    launcher.launch(forward_rows, by_key=False, out=out, lse=lse)
    return AttentionOutputs(out, lse)


def backward(inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, with_direction: bool) -> Gradients:
    """See ``escaip.ops.inputs.KernelBackend``."""
    launcher = _Launcher.of(inputs)
    gradients, bias, turn = launcher.gradients(with_direction)
    if not launcher.nothing:
        out, lse = (x.contiguous() for x in outputs)
        rows, columns = (None, None) if turn is None else turn.unbind(0)
        common = {
            "grad_out": grad_out.contiguous(), "lse": lse, "dots": lse.new_empty(lse.shape[::-1]),
            "num_queries": out.shape[0], "WITH_DN": turn is not None,
        }  # fmt: skip
        dq, dk, dv = gradients[:3]
        launcher.launch(backward_rows, by_key=False, out=out, dq=dq, dn=rows, **common)
        launcher.launch(
            backward_columns, by_key=True, dk=dk, dv=dv, db=bias, dn=columns, num_keys=dk.shape[0], **common
        )
    return _summed(gradients, bias, turn)


def double_backward(
    inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, tangents: Gradients
) -> tuple[Tensor, Gradients]:
    """See ``escaip.ops.inputs.KernelBackend``."""
    launcher = _Launcher.of(inputs)
    gradients, bias, turn = launcher.gradients(True)
    to_grad_out = torch.zeros_like(launcher["q"]) if launcher.nothing else torch.empty_like(launcher["q"])
    if not launcher.nothing:
        out, lse = (x.contiguous() for x in outputs)
        rows, columns = (None, None) if turn is None else turn.unbind(0)
        common = {
            "tq": tangents.q.contiguous(), "tk": tangents.k.contiguous(), "tv": tangents.v.contiguous(),
            "tb": _tangent(tangents.log_envelope, inputs.log_envelope),
            "tn": _tangent(tangents.direction, inputs.direction), "grad_out": grad_out.contiguous(), "lse": lse,
            **{name: lse.new_empty(lse.shape[::-1]) for name in ("dots", "means", "dots_t")},
            "num_queries": out.shape[0],
        }  # fmt: skip
        gq, gk, gv = gradients[:3]
        launcher.launch(
            double_backward_rows, by_key=False, out=out, grad_grad_out=to_grad_out, gq=gq, gn=rows, **common
        )
        launcher.launch(
            double_backward_columns, by_key=True, gk=gk, gv=gv, gb=bias, gn=columns, num_keys=gk.shape[0], **common
        )
    return to_grad_out, _summed(gradients, bias, turn)


def _summed(gradients: Gradients, bias: Tensor | None, turn: Tensor | None) -> Gradients:
    return gradients._replace(
        log_envelope=None if bias is None else bias.sum(0), direction=None if turn is None else turn.sum((0, 1))
    )


def _tangent(tangent: Tensor | None, of: Tensor | None) -> Tensor | None:
    if of is None:
        return None
    return torch.zeros_like(of) if tangent is None else tangent.contiguous()
