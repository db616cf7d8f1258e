"""The energy and its derivative as one function of tensors: run as it is, compiled, or in chunks of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from escaip.graph import TokenChunks, token_geometry
from escaip.models import Model, ModelConfig
from escaip.ops import sum_rows
from escaip.potential.precision import in_precision
from escaip.types import AtomInputs, ModelOutput, TokenLayout

_MOST_KEPT = (4 * 2**30, 16 * 2**30)  # CPU, CUDA
_CHUNK, _LARGE_CHUNK = 6_000, 200_000

LAYOUT = tuple(field.name for field in dataclasses.fields(TokenLayout))
ATOMS = tuple(field.name for field in dataclasses.fields(AtomInputs))


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation depends on besides the weights; first dimensions are sizes of the batch.

    Attributes:
        vectors: ``(R, 3)`` Å, float64, displacements of the ``R = T + X`` rows of the layout.
        weight: ``(N,)`` factor of each atomic energy in the sum that is differentiated, in the model's dtype.
        atoms: ``(N,)`` each.
        layout: of the tokens; a graph will do.
    """

    vectors: Tensor
    weight: Tensor
    atoms: AtomInputs
    layout: TokenLayout

    def flat(self) -> list[Tensor]:
        """Returns all tensors in one order."""
        of_atoms = (getattr(self.atoms, name) for name in ATOMS)
        return [self.vectors, self.weight, *of_atoms, *(getattr(self.layout, name) for name in LAYOUT)]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> EvaluationInputs:
        """Inverse of ``flat``."""
        end = 2 + len(ATOMS)
        return cls(tensors[0], tensors[1], AtomInputs(*tensors[2:end]), TokenLayout(*tensors[end:]))


def energy_and_gradient(
    model: Model,
    inputs: EvaluationInputs,
    differentiate: bool,
    create_graph: bool,
    *,
    max_tokens: int | None = None,
    recompute: float = 0.0,
) -> tuple[ModelOutput, Tensor | None]:
    """Runs a model, and differentiates the weighted sum of its energies with respect to the displacements.

    Args:
        model: in the dtype of the inputs.
        inputs: of a batch, for the graph settings of the model.
        differentiate: whether the gradient is wanted.
        create_graph: whether the gradient will be differentiated.
        max_tokens: see ``TokenChunks``.
        recompute: see ``TokenChunks``.

    Returns:
        The output, and the gradient ``(R, 3)`` in the dtype of the displacements if it was asked for.
    """
    layout, vectors, dtype = inputs.layout, inputs.vectors, inputs.weight.dtype
    if differentiate and not vectors.requires_grad:
        vectors = vectors.detach().requires_grad_()
    with in_precision("highest", vectors.device) as rounded:
        geometry = token_geometry(vectors, layout, model.config.graph, dtype)
        # PyTorch's autocast leaves float64 alone, too.
        rounded = None if dtype == torch.float64 else rounded
        output = model(inputs.atoms, TokenChunks(layout, geometry, max_tokens, recompute, rounded))
        if not differentiate:
            return output, None
        (gradient,) = torch.autograd.grad(output.energy, vectors, inputs.weight, create_graph=create_graph)
    return output, gradient


@dataclass(frozen=True)
class EvaluationRequest:
    """The kind of an evaluation.

    Attributes:
        differentiate: whether the gradient with respect to the displacements is computed.
        create_graph: whether the gradient will be differentiated.
        learning: whether the weights need gradients.
        precision: of ``escaip.potential.precision.PRECISIONS``.
        recompute: whether activations are recomputed for derivatives; None where a prediction would keep too many.
    """

    differentiate: bool
    create_graph: bool
    learning: bool
    precision: str = "highest"
    recompute: bool | None = None

    @property
    def is_prediction(self) -> bool:
        """Whether nothing is differentiated afterwards."""
        return not (self.learning or self.create_graph)

    def share_recomputed(self, config: ModelConfig, inputs: EvaluationInputs) -> float:
        """Returns the share of the calls whose activations are computed twice."""
        if self.recompute is not None:
            return float(self.recompute)
        if not self.is_prediction:
            return 0.0
        return plan_chunks(config, inputs.layout.num_tokens, inputs.vectors.device)[1]


class Evaluator(Protocol):
    """Evaluates a model and the gradient of its energy: uncompiled, compiled, or by exported code."""

    def __call__(
        self, model: Model, inputs: EvaluationInputs, request: EvaluationRequest
    ) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch.

        Args:
            model: in the dtype of the inputs' weights.
            inputs: of the batch.
            request: the kind of evaluation.

        Returns:
            The model's output, and the gradient ``(R, 3)`` of the weighted energies with respect to the displacements
            in float64, eV/Å, at least if it was asked for.
        """


class EagerEvaluator:
    """Evaluates operation by operation, in chunks that fit into caches and memory."""

    def __call__(
        self, model: Model, inputs: EvaluationInputs, request: EvaluationRequest
    ) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``Evaluator``."""
        device, predicting = inputs.vectors.device, request.is_prediction
        most = plan_chunks(model.config, inputs.layout.num_tokens, device)[0] if predicting else None
        recompute = request.share_recomputed(model.config, inputs) if torch.is_grad_enabled() else 0.0
        with in_precision(request.precision, device), frozen(model) if predicting else contextlib.nullcontext():
            return energy_and_gradient(
                model, inputs, request.differentiate, request.create_graph, max_tokens=most, recompute=recompute
            )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Lets the weights need no gradients within, so that nothing is kept for them: half of the memory."""
    learned = [weight for weight in model.parameters() if weight.requires_grad and weight.is_leaf]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learned:
            weight.requires_grad_()


def plan_chunks(config: ModelConfig, num_tokens: int, device: torch.device) -> tuple[int | None, float]:
    """Returns how a prediction is divided: ``max_tokens`` and ``recompute`` of ``energy_and_gradient``.

    On a CPU, chunks that stay in its caches are faster. A few GiB are kept for the derivative, and what goes beyond is
    computed again, so that the time grows with the share that does not fit (docs/howto/speed.md).
    """
    kept = 4 * num_tokens * config.kept_per_token
    recompute = max(0.0, 1.0 - _MOST_KEPT[device.type == "cuda"] / max(kept, 1))
    return (_CHUNK if device.type == "cpu" else _LARGE_CHUNK if recompute else None), recompute


def forces_of(gradient: Tensor, graph: TokenLayout) -> Tensor:
    """Returns ``−∂E/∂r``, ``(N, 3)``, from the gradient with respect to each displacement ``r_j − r_i``."""
    on_center = sum_rows(gradient, graph.center, graph.num_atoms)
    return on_center - sum_rows(gradient, graph.neighbor, graph.num_atoms)


def virials_of(vectors: Tensor, gradient: Tensor, graph: TokenLayout) -> Tensor:
    """Returns a symmetric share ``W_i`` of ``Σ d ⊗ ∂E/∂d`` for each atom, ``(N, 3, 3)`` eV: half of a row per end.

    How a many-body energy's virial is divided is a convention (Fan et al., Phys. Rev. B 92, 094301, 2015): only the sum
    is physical. A pair is two rows, ``i → j`` and ``j → i``; halves depend on the pair's force
    ``∂E/∂d_ij − ∂E/∂d_ji`` alone, where giving a row to its center would depend on which of the two the model happens
    to read. It is what LAMMPS does for pair potentials. For heat fluxes it is not enough: those need the derivatives of
    each atom's energy (Langer et al., J. Chem. Phys. 159, 174105, 2023).

    Args:
        vectors: ``(T + X, 3)`` Å, displacements of the rows.
        gradient: ``(T + X, 3)`` eV/Å, of the energy with respect to them.
        graph: whose rows they are.
    """
    rows = 0.5 * vectors.unsqueeze(2) * gradient.unsqueeze(1)
    shares = sum_rows(rows, graph.center, graph.num_atoms) + sum_rows(rows, graph.neighbor, graph.num_atoms)
    return 0.5 * (shares + shares.transpose(1, 2))


def stress_of(virial: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Returns ``(1/V) ∂E/∂ε``, ``(B, 3, 3)`` eV/Å³, from ``Σ d ⊗ ∂E/∂d``; NaN for systems without a periodic cell."""
    volume = torch.linalg.det(cell).abs()
    has_volume = (volume > 0) & pbc.any(-1)
    symmetric = 0.5 * (virial + virial.transpose(1, 2))  # the strain is symmetric
    divided = symmetric / torch.where(has_volume, volume, 1.0)[:, None, None]
    return torch.where(has_volume[:, None, None], divided, torch.nan)
