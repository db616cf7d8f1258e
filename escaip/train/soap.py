"""SOAP: Adam in the eigenbases of the gradients' second moments (Vyas et al., arXiv 2409.11321)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from escaip.errors import CheckpointError


class SOAP(Optimizer):
    """Algorithm 3 of the paper, with one step of power iteration and QR (Algorithm 4) to refresh the bases.

    ``K`` matrices ``(m, n)`` of a group are stacked, so a step is few large products instead of many small ones. The
    first moment is kept in the eigenbases and turned with them, where the paper projects it anew in each step: the
    same numbers. Vectors have no bases, which is Adam. The first step only gathers moments. Beside others of its
    shape, a gradient that is None counts as zero.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the first and of all second moments for each step.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        frequency: steps from one refresh of the bases to the next.

    The state is that of the first parameter of a stack: ``exp_avg`` and ``exp_avg_sq`` ``(K, m, n)``, and for matrices
    ``left``, ``left_basis`` ``(K, m, m)`` and ``right``, ``right_basis`` ``(K, n, n)``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        frequency: int = 10,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "frequency": frequency}
        super().__init__(params, {**settings, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; returns what ``closure`` returns, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            stacks: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                stacks.setdefault(parameter.shape, []).append(parameter)
            for stack in stacks.values():
                if any(parameter.grad is not None for parameter in stack):
                    self._step(stack, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            CheckpointError: it is not one of this class.
        """
        if any("exp_avg" not in state or "GG" in state for state in state_dict["state"].values()):
            raise CheckpointError("the state of the optimizer is not one of SOAP as it is here: start a new run")
        super().load_state_dict(state_dict)

    def _step(self, stack: list[Tensor], group: dict[str, Any]) -> None:
        gradient = torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in stack])
        state, (first, second), time = self.state[stack[0]], group["betas"], group["step"] - 1
        are_matrices = gradient.dim() == 3
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            if are_matrices:
                for side, product in (("left", gradient @ gradient.mT), ("right", gradient.mT @ gradient)):
                    state[side] = (1 - second) * product
                    basis = torch.linalg.eigh(product.double())[1].flip(2)  # largest eigenvalues first
                    state[f"{side}_basis"] = basis.to(gradient.dtype)
            return
        rotated = state["left_basis"].mT @ gradient @ state["right_basis"] if are_matrices else gradient
        state["exp_avg"].lerp_(rotated, 1 - first)
        state["exp_avg_sq"].lerp_(rotated.square(), 1 - second)
        change = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
        if are_matrices:
            change = state["left_basis"] @ change @ state["right_basis"].mT
        size = group["lr"] * math.sqrt(1 - second**time) / (1 - first**time)
        torch._foreach_add_(stack, list(change.unbind()), alpha=-size)
        torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])
        if are_matrices:
            state["left"].baddbmm_(gradient, gradient.mT, beta=second, alpha=1 - second)
            state["right"].baddbmm_(gradient.mT, gradient, beta=second, alpha=1 - second)
            if time % group["frequency"] == 0:
                _refresh(state)


def _refresh(state: dict[str, Tensor]) -> None:
    """Turns the bases by a step of power iteration, in the order of their eigenvalues, and the moments with them."""
    turns = []
    for axis, side in ((1, "left"), (2, "right")):
        basis = state[f"{side}_basis"]
        product = state[side] @ basis
        order = (basis * product).sum(1).argsort(descending=True)  # (K, m)
        state[f"{side}_basis"] = torch.linalg.qr(product.gather(2, order[:, None].expand_as(product)))[0]
        turns.append(state[f"{side}_basis"].mT @ basis)
        squares = state["exp_avg_sq"]
        state["exp_avg_sq"] = squares.gather(axis, order.unsqueeze(3 - axis).expand_as(squares))
    state["exp_avg"] = turns[0] @ state["exp_avg"] @ turns[1].mT
