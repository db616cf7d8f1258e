"""The linear part of a model's energy, solved for in closed form before training begins and while it goes on.

Least squares for energies, forces and stresses of a training set in the density invariants of atoms
(``escaip.nn.density``) and one constant for each element. Forces and stresses enter as derivatives along random
displacements and strains, which are differences of two evaluations: a row of the fit each, whatever the number of
coefficients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from escaip.data import AtomicData, collate
from escaip.data.dataset import evenly
from escaip.errors import ConfigError
from escaip.graph import build_graph, displacements, token_geometry
from escaip.graph.tokens import split_tokens
from escaip.nn.density import DensityInvariants
from escaip.potential import Potential
from escaip.types import AtomInputs, Graph, Prediction, StructureBatch

_MAX_STRUCTURES, _ATOMS = 1000, 600  # of the fit, and evaluated together
_STEP = 1e-4  # Å, and of strains
_ROUNDS = 5  # of reweighted least squares
_RIDGE = 0.01
# While training: when, as a part of all steps; how often, in steps; forces in units of the potential's scale; ridge.
_REFIT_FROM, _REFIT_EVERY, _REFIT_FORCE, _REFIT_RIDGE = 0.3, 20, 0.15, 1e-4
# Errors from which on rows count by their size and not by its square: forces in units of their RMS, energies per atom
# and stresses in units of that of forces.
_FORCE, _ENERGY, _STRESS = 0.05, 1 / 50, 1 / 10
_LEAST_VARIANCE = 1e-4  # of a feature


def invariants_of(potential: Potential) -> DensityInvariants:
    """Returns the density invariants of a model that has them."""
    density: Any = potential.model.density
    assert isinstance(density, DensityInvariants)
    return density


class Rows:
    """Equations ``x · u = y`` with ``u`` of ``E`` constants, then ``(C, F)`` coefficients, of a batch of structures.

    Energies per atom, forces along random directions and stresses along random strains, each over an error from which
    on it counts by its size. Rows of unknown labels are left out.

    Args:
        potential: whose elements and invariants are meant.
        directions: of forces, for each structure.
        seed: of the directions.
    """

    def __init__(self, potential: Potential, directions: int, seed: int = 0) -> None:
        density = invariants_of(potential)
        self.density, self.graph = copy.deepcopy(density).double(), potential.config.graph
        self.directions, self.device = directions, density.channel.device
        self.generator = torch.Generator().manual_seed(seed)
        elements = list(potential.metadata.elements)
        self.num_elements = len(elements)
        self.place = torch.zeros(len(density.channel), dtype=torch.long, device=self.device)
        self.place[elements] = torch.arange(self.num_elements, device=self.device)

    def __call__(
        self, batch: StructureBatch, energy: Tensor, forces: Tensor, stress: Tensor, limit: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns ``x``, ``y``, the kind of each row (0 energy, 1 force, 2 stress) and the features of all atoms.

        Args:
            batch: float64, periodic and other structures.
            energy: ``(B,)`` eV, to be fitted; NaN where unknown, as in the others.
            forces: ``(N, 3)`` eV/Å.
            stress: ``(B, 3, 3)`` eV/Å³.
            limit: eV/Å from which on a force counts by its size.
        """
        sizes, none = (batch.ptr[1:] - batch.ptr[:-1]).double(), torch.zeros_like(batch.cell)
        graph = build_graph(batch, self.graph)
        features = self.features(batch, graph)
        unit = limit * _ENERGY * sizes
        found = [(0, self.sums(batch, features) / unit[:, None], energy / unit)]
        free = ~batch.fixed & ~torch.isnan(forces).any(1)
        unit = limit * torch.zeros_like(sizes).index_add(0, batch.batch, free.double()).sqrt()
        unit = torch.where(unit > 0, unit, torch.nan)
        for _ in range(self.directions):
            move = self.normal(len(free), 3) * free[:, None]
            work = torch.zeros_like(sizes).index_add(0, batch.batch, -(forces.nan_to_num() * move).sum(1))
            found.append((1, self.derivative(batch, graph, move, none) / unit[:, None], work / unit))
        unit = limit * _STRESS * torch.where(batch.pbc.all(1), torch.linalg.det(batch.cell).abs(), torch.nan)
        if not bool(torch.isnan(stress.sum((1, 2)) + unit).all()):
            strain = self.normal(len(sizes), 3, 3)
            strain = 0.5 * (strain + strain.transpose(1, 2))
            change = self.derivative(batch, graph, torch.zeros_like(batch.positions), strain)
            found.append((2, change / unit[:, None], (stress * strain).sum((1, 2)) / (limit * _STRESS)))
        x, y = torch.cat([x for _, x, _ in found]), torch.cat([y for _, _, y in found])
        kind = torch.cat([torch.full_like(y, number, dtype=torch.long) for number, _, y in found])
        known = ~(torch.isnan(y) | torch.isnan(x).any(1))
        return x[known], y[known], kind[known], features

    def features(self, batch: StructureBatch, graph: Graph) -> Tensor:
        """Returns the invariants of all atoms, ``(N, F)``."""
        vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
        geometry = token_geometry(vectors, graph, self.graph, torch.float64)
        (tokens,) = split_tokens(graph, geometry)
        return self.density(tokens, AtomInputs.of_batch(batch))

    def sums(self, batch: StructureBatch, features: Tensor) -> Tensor:
        """Returns the atoms of each element and the features of each channel, ``(B, E + C F)``."""
        kinds = torch.nn.functional.one_hot(self.place[batch.atomic_numbers], self.num_elements)
        channel = self.density.channel[batch.atomic_numbers]
        rows = torch.cat([kinds, (channel.unsqueeze(2) * features.unsqueeze(1)).flatten(1)], 1)
        return rows.new_zeros(batch.ptr.numel() - 1, rows.shape[1]).index_add_(0, batch.batch, rows)

    def derivative(self, batch: StructureBatch, graph: Graph, displacement: Tensor, strain: Tensor) -> Tensor:
        """Returns the derivative of ``sums`` along ``displacement (N, 3)`` Å and ``strain (B, 3, 3)``."""
        ends, unit = [], torch.eye(3, dtype=torch.float64, device=self.device)
        for step in (_STEP, -_STEP):
            moved, deformation = copy.copy(batch), unit + step * strain
            positions = torch.einsum("ni,nij->nj", batch.positions, deformation[batch.batch])
            moved.positions, moved.cell = positions + step * displacement, batch.cell @ deformation
            ends.append(self.sums(moved, self.features(moved, graph)))
        return (ends[0] - ends[1]) / (2 * _STEP)

    def normal(self, *shape: int) -> Tensor:
        """Returns normal random numbers, the same on every device."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device)


class LinearRefit:
    """Solves for the linear energy again and again, on what the whole model leaves of the labels.

    Frames of a rare kind move a network little. Least squares weigh them like the others, and a whole epoch at once:
    recursive least squares that forget over half an epoch, reweighted for a Huber loss.

    Args:
        potential: with a linear energy.
        constants: whether references are shifted too.

    Attributes:
        fitted: ``constants``, of the one set there is.
        sums: ``(P, P + 2)`` float64: ``w x xᵀ``, ``w x y``, and ``x²`` over the rows that are derivatives.
    """

    def __init__(self, potential: Potential, constants: bool) -> None:
        self.potential, self.constants, self.fitted = potential, constants, (constants,)
        count = len(potential.metadata.elements) + invariants_of(potential).coefficients.numel()
        self.sums = torch.zeros(count, count + 2, dtype=torch.float64)

    @torch.no_grad()
    def of_batch(self, prediction: Prediction, batch: StructureBatch) -> Tensor:
        """Returns the addition of a batch to ``sums``, flat; random directions are those of PyTorch's present seed."""
        unknown = torch.full_like(batch.positions, torch.nan), torch.full_like(batch.cell, torch.nan)
        forces = unknown[0] if prediction.forces is None else batch.forces.double() - prediction.forces
        stress = unknown[1] if prediction.stress is None else batch.stress.double() - prediction.stress
        rows, limit = Rows(self.potential, 1, torch.initial_seed()), _REFIT_FORCE * float(self.potential.scale)
        x, y, kinds, _ = rows(batch, batch.energy.double() - prediction.energy, forces, stress, limit)
        weighted = x.T * y.abs().clamp_min(1.0).reciprocal()
        size = x[kinds > 0].square().sum(0)
        return torch.cat([weighted @ x, (weighted @ y)[:, None], size[:, None]], 1).flatten()

    def add(self, sums: Tensor, batches: float) -> None:
        """Adds the result of ``of_batch``; ``batches`` make an epoch, and what is half an epoch old counts 1/e."""
        self.sums = math.exp(-2.0 / batches) * self.sums.to(sums.device) + sums.view_as(self.sums)

    def is_due(self, step: int, steps: int, last_batch: bool) -> bool:
        """Whether the linear energy is solved for before this step."""
        return step >= _REFIT_FROM * steps and step % _REFIT_EVERY == 0

    @torch.no_grad()
    def apply(self, potential: Potential) -> None:
        """Adds the solution to a potential."""
        matrix, right, size = self.sums[:, :-2], self.sums[:, -2], self.sums[:, -1]
        number = len(self.potential.metadata.elements)
        constant = torch.arange(len(size), device=size.device) < number
        size = torch.where(constant, 0.0, size if bool(size.any()) else matrix.diagonal())
        size = torch.where(constant, matrix.diagonal(), size + 1e-6 * size.max())
        free = ~constant | self.constants & (size > 0.0)
        unit = torch.where(free, size, 1.0).rsqrt() * free
        scaled = (
            unit[:, None] * matrix * unit + torch.where(constant, torch.where(free, 1e-7, 1.0), _REFIT_RIDGE).diag()
        )
        solution = unit * torch.linalg.solve(scaled, unit * right)
        _add(potential, solution)
        self.sums[:, -2] -= matrix @ solution


@torch.no_grad()
def fit_linear_energy(
    potential: Potential, structures: Sequence[AtomicData], force_rms: float, constants: bool = True
) -> None:
    """Sets the linear energy of a potential, the mean and spread of its features, shifts of its references, and scale.

    Args:
        potential: with references, and a model with density invariants.
        structures: the training set; of a larger one 1 000, evenly spread.
        force_rms: eV/Å, of the training set.
        constants: whether references are shifted too; those of isolated atoms, whose invariants are zero, stay.

    Raises:
        ConfigError: several sets of references, more elements than channels, or no forces.
    """
    density = invariants_of(potential)
    elements = list(potential.metadata.elements)
    if potential.element_references.dim() > 1:
        raise ConfigError("density_radial is for one training set; with several, set it to 0")
    channels = density.channel.shape[1]
    if len(elements) > channels:
        raise ConfigError(
            f"density_channels is {channels}, but the training set has {len(elements)} elements: set it to "
            f"{len(elements)}, or density_radial to 0"
        )
    if not force_rms > 0.0:
        raise ConfigError("density_radial is fitted to forces, and no training structure has any: set it to 0")
    density.channel.zero_()
    density.channel[elements, range(len(elements))] = 1.0
    number = min(len(structures), _MAX_STRUCTURES)
    directions = max(2, min(16, -(-2 * density.coefficients.numel() // number)))
    rows, limit, found = Rows(potential, directions), _FORCE * force_rms, []
    moments = [torch.zeros_like(one) for one in (density.mean[:, :1], density.mean, density.mean)]
    for batch in _batches(structures, number):
        references = torch.zeros_like(batch.energy).index_add(0, batch.batch, potential.atomic_references(batch))
        *equations, features = rows(batch, batch.energy - references, batch.forces.double(), batch.stress, limit)
        found.append(equations)
        powers = (torch.ones_like(features[:, :1]), features, features.square())
        for moment, power in zip(moments, powers, strict=True):
            moment.index_add_(0, batch.atomic_numbers, power)
    x, y, kinds = (torch.cat(parts) for parts in zip(*found, strict=True))
    mean, square = (moment / moments[0].clamp_min(1.0) for moment in moments[1:])
    density.mean.copy_(mean)
    density.spread.copy_((square - mean.square()).clamp_min(0.0).add(_LEAST_VARIANCE).sqrt())
    x[:, : len(elements)] *= constants
    solution, residual = _solve(x, y, kinds, len(elements))
    potential.scale.fill_(float((residual[kinds == 1] * limit).square().mean().sqrt()))
    density.coefficients.zero_()
    _add(potential, solution)


def _add(potential: Potential, solution: Tensor) -> None:
    """Adds constants to the references and coefficients to the linear energy, in place: compiled code reads them."""
    coefficients, elements = invariants_of(potential).coefficients, list(potential.metadata.elements)
    potential.element_shifts[elements] += solution[: len(elements)]
    coefficients += solution[len(elements) :].view_as(coefficients) / potential.scale


def _batches(structures: Sequence[AtomicData], number: int) -> Iterator[StructureBatch]:
    waiting: list[AtomicData] = []
    for place, data in enumerate(evenly(structures, number), 1):
        waiting.append(data)
        if sum(one.num_nodes for one in waiting) >= _ATOMS or place == number:
            batch = collate(waiting)
            batch.positions, batch.cell = batch.positions.double(), batch.cell.double()
            yield batch
            waiting = []


def _solve(x: Tensor, y: Tensor, kinds: Tensor, num_elements: int) -> tuple[Tensor, Tensor]:
    """Returns ``u`` and the residuals; reweighted least squares for a Huber loss, with a ridge on the coefficients."""
    constant = torch.arange(x.shape[1]) < num_elements
    forces = x[kinds == 1].square().mean(0).sqrt()
    # Features that no atom has, of elements in fewer channels, get a size too, and the coefficient 0.
    size = torch.where(constant, x.square().mean(0).sqrt(), forces + 1e-3 * forces[~constant].max())
    size = torch.where(size > 0.0, size, 1.0)
    scaled, penalty = x / size, len(x) * torch.where(constant, 1e-7, _RIDGE)
    weight, solution = torch.ones_like(y), torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(_ROUNDS):
        weighted = scaled.T * weight
        solution = torch.linalg.solve(weighted @ scaled + penalty.diag(), weighted @ y)
        weight = (y - scaled @ solution).abs().clamp_min(1.0).reciprocal()
    return solution / size, y - scaled @ solution
