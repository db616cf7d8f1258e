"""From a batch of structures to energy, forces and stress."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from escaip.data import Statistics
from escaip.errors import CheckpointError, ConfigError, EscaipError
from escaip.files import first_line, html_table
from escaip.graph import attached_neighbors, build_graph, displacements, search_cutoff
from escaip.models import MAX_ATOMIC_NUMBER, ModelConfig, kind_named, kind_of
from escaip.nn.layers import PreciseTables
from escaip.ops import sum_rows
from escaip.potential.atomic_energies import (
    check_charges,
    check_elements,
    dataset_codes,
    missing_reference,
    references_of,
)
from escaip.potential.compile import compiled
from escaip.potential.derivatives import (
    EagerEvaluator,
    EvaluationInputs,
    EvaluationRequest,
    Evaluator,
    forces_of,
    stress_of,
    virials_of,
)
from escaip.potential.hessian import hessian
from escaip.potential.model_file import PotentialMetadata, describe, migrate, write_model_file
from escaip.potential.precision import check_precision
from escaip.potential.predict import StructurePrediction, iter_predict
from escaip.potential.zbl import ZBL, BondGuard, CoreGuard, repel
from escaip.types import MAX_CHARGE, TARGETS, AtomInputs, Graph, NeighborList, Prediction, StructureBatch

__all__ = ["Potential", "PotentialMetadata"]

ORIGIN = ("model", "model_sha256", "level_of_theory", "dataset")
"""Names under which results state what they come from: files, their digests, level of theory, and set of references."""

ENERGY_BUFFERS = ("element_references", "element_shifts", "charge_energies", "scale")
"""Buffers of a potential with a leading dimension ``S`` where it was trained on ``S`` data sets."""


class Potential(PreciseTables):
    """An interatomic potential: model, element references, scale and derivatives.

    ``E = Σ_i (reference[Z_i] + shift[Z_i] + scale · ε_i) + charge_energies[Q]`` with ``ε_i`` the model's per-atom
    energies, summed in float64, plus a repulsion at short distances. Atoms share the energy of the total charge ``Q``
    equally; models that are not conditioned on charge have no such term. Potentials trained on several data sets have
    references, shifts, energies of charges and a scale for each, and some models a head for each
    (``num_energy_heads``), chosen by ``batch.dataset`` or, where that is −1, by ``choose_dataset``. Forces are
    ``−∂E/∂r`` or, for direct-force models, ``scale ·`` the force head; stress is ``(1/V) ∂E/∂ε`` for a symmetric strain
    ``ε``, positive in tension. Positions and cells are read in float64, displacements formed in float64 and cast to the
    model's dtype (float32 or float64).

    Args:
        config: the model.
        metadata: what it was trained on; unknown for a fresh model.

    Attributes:
        element_references: ``(119,)`` eV by atomic number, or ``(S, 119)`` for several sets, NaN for elements that a
            set does not have.
        element_shifts: of the same shape, eV; training adds them to the references (docs/concepts/energies.md).
        charge_energies: ``(41,)`` or ``(S, 41)`` eV by total charge from −20 on; 0 for neutral structures and
            for charges that training did not show.
        scale: ``()`` or ``(S,)`` eV.
        repulsion, core_guard, bond_guard: between atoms at distances that training did not show; none for a fresh
            model (``escaip.potential.zbl``).
        recompute: whether activations are recomputed for derivatives (activation checkpointing): less memory for about
            a third more time. None, the default, recomputes where a prediction would keep several GiB.
        precision: ``"highest"``, the model's own; ``"tf32"`` for products of float32 matrices on CUDA; ``"float16"`` or
            ``"bfloat16"`` for products and attention of tokens, the rest in float32 (docs/howto/speed.md).
        evaluator: runs the model and the gradient of its energy: uncompiled, compiled, or exported.
        source: name and SHA-256 of the file that ``load_potential`` read it from; None for any other.
    """

    element_references: Tensor
    element_shifts: Tensor
    charge_energies: Tensor
    scale: Tensor
    supported: Tensor

    def __init__(self, config: ModelConfig, *, metadata: PotentialMetadata | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = kind_of(config).model(config)
        self.repulsion, self.core_guard, self.bond_guard = ZBL(), CoreGuard(), BondGuard()
        for name in ("element_references", "element_shifts"):
            self.register_buffer(name, torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64))
        self.register_buffer("charge_energies", torch.zeros(2 * MAX_CHARGE + 1, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("supported", torch.ones(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool), persistent=False)
        self.set_metadata(metadata or PotentialMetadata())
        self._dataset = -1
        self.recompute: bool | None = None
        self.precision = "highest"
        self.evaluator: Evaluator = EagerEvaluator()
        self.source: tuple[str, str] | None = None

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the sets with references or heads of their own, numbers as long as heads have no names; or none."""
        count = self.config.num_energy_heads
        names = self.metadata.datasets if count > 1 or self.element_references.dim() == 2 else ()
        return names or (tuple(map(str, range(count))) if count > 1 else ())

    def check_sets(self, names: Sequence[str]) -> None:
        """Raises ConfigError where the model has an energy head for each set, and there are other than these sets."""
        count, named = self.config.num_energy_heads, [name for name in names if name]
        if count > 1 and len(named) != count:
            raise ConfigError(
                f"num_energy_heads is {count}, one for each data set, but training has {len(named)} sets by name "
                f"({', '.join(named) or 'none'}): set model.architecture.num_energy_heads to {max(len(named), 1)}"
            )

    def choose_dataset(self, name: str | None) -> None:
        """Chooses the references and scale of structures that state no data set.

        Raises:
            ConfigError: no such set; the message lists the known ones.
        """
        if name is None:
            self._dataset = -1
        elif name in self.datasets:
            self._dataset = self.datasets.index(name)
        else:
            known = ", ".join(self.datasets) or "one set of references only: leave it out"
            raise ConfigError(f"dataset {name!r} has no references in this potential, which has {known}")

    @property
    def dataset(self) -> str | None:
        """The set chosen by ``choose_dataset``."""
        return None if self._dataset < 0 else self.datasets[self._dataset]

    @property
    def cutoff(self) -> float:
        """Radius in Å beyond which atoms do not interact directly."""
        return self.config.graph.cutoff

    @property
    def search_cutoff(self) -> float:
        """Radius in Å up to which a neighbor list must be complete."""
        return search_cutoff(self.config.graph)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.element_references.device

    def set_metadata(self, metadata: PotentialMetadata) -> None:
        """Replaces the metadata and, with it, the elements that are accepted."""
        self.metadata = metadata
        supported = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
        supported[list(metadata.elements) or slice(1, None)] = True
        self.supported = supported.to(self.device)

    def set_statistics(
        self,
        statistics: Statistics | Mapping[str, Statistics],
        *,
        shares: Mapping[str, float] | None = None,
        scale: str = "shared",
    ) -> None:
        """Sets element references, scale (force RMS) and elements from the statistics of one or several training sets.

        Args:
            statistics: of the set, or of each set by name.
            shares: of each set in training, for the shared scale; default by structures.
            scale: for several sets, ``"shared"`` (the force RMS of the mixture, so that equal forces in different sets
                are equal outputs of the model) or ``"per_set"``.

        Raises:
            ConfigError: the force RMS of a set with forces is not a positive number, an unknown ``scale``, or another
                number of sets than the model has energy heads, where it has several.
        """
        found = statistics if isinstance(statistics, Mapping) else {"": statistics}
        self.check_sets(list(found))
        references, scales = references_of(found, shares, scale)
        if not isinstance(statistics, Mapping):
            references, scales = references[0].nan_to_num(0.0), scales[0]
        self.set_references(references, scales)
        elements = tuple(sorted({int(z) for item in found.values() for z in item.elements}))
        names = tuple(found) if isinstance(statistics, Mapping) else self.metadata.datasets
        self.set_metadata(replace(self.metadata, elements=elements, datasets=names))

    def set_references(self, references: Tensor, scale: Tensor, charge_energies: Tensor | None = None) -> None:
        """Sets references, ``(119,)`` or ``(S, 119)`` eV, scale, ``()`` or ``(S,)`` eV, and energies of charges.

        Shifts are zero then, and so are the energies of charges where none are given.
        """
        zeros = missing_energies(references)
        energies = zeros["charge_energies"] if charge_energies is None else charge_energies
        self.element_references, self.scale = references.to(self.device), scale.to(self.device)
        self.element_shifts, self.charge_energies = zeros["element_shifts"].to(self.device), energies.to(self.device)

    def atomic_references(self, batch: StructureBatch) -> Tensor:
        """Returns the element reference of each atom and its share of the energy of the charge, ``(N,)`` float64 eV.

        Raises:
            ConfigError: the potential has several sets of references and the batch chooses none.
            UnsupportedElementError: an element that the set lacks.
        """
        references = self._of_atoms(self.element_references, batch)
        if self.element_references.dim() == 2 and bool(torch.isnan(references).any()):
            raise missing_reference(references, batch, self._dataset_codes(batch), self.datasets)
        if not self.config.charge:
            return references
        table, charge = self.charge_energies, batch.charge + MAX_CHARGE
        energies = table[charge] if table.dim() == 1 else table[self._dataset_codes(batch), charge]
        return references + (energies / (batch.ptr[1:] - batch.ptr[:-1]))[batch.batch]

    def atomic_shifts(self, batch: StructureBatch) -> Tensor:
        """Returns the shift of each atom's reference, ``(N,)`` float64 eV."""
        return self._of_atoms(self.element_shifts, batch)

    def atomic_scale(self, batch: StructureBatch) -> Tensor:
        """Returns the scale of the model's energies, ``()`` or ``(N,)`` float64 eV."""
        return self.scale if self.scale.dim() == 0 else self.scale[self._dataset_codes(batch)[batch.batch]]

    def _of_atoms(self, table: Tensor, batch: StructureBatch) -> Tensor:
        if table.dim() == 1:
            return table[batch.atomic_numbers]
        return table[self._dataset_codes(batch)[batch.batch], batch.atomic_numbers]

    def _dataset_codes(self, batch: StructureBatch) -> Tensor:
        """Returns the data set of each structure, ``(B,)``."""
        return dataset_codes(batch, self._dataset, self.datasets)

    def forward(
        self,
        batch: StructureBatch,
        *,
        neighbors: NeighborList | None = None,
        graph: Graph | None = None,
        compute_forces: bool = True,
        compute_stress: bool = False,
        compute_virials: bool = False,
        create_graph: bool | None = None,
    ) -> Prediction:
        """Predicts energy, forces and stress of a batch; the batch is not changed.

        Args:
            batch: from ``escaip.data.collate``, on the potential's device.
            neighbors: pairs complete up to ``search_cutoff`` or beyond; by default those attached to the batch, or a
                fresh list.
            graph: of ``graph_of``, valid at these positions; the batch is then not checked, and the host waits for
                the device only where it looks up several sets of atomic energies or heads.
            compute_forces: whether forces are computed.
            compute_stress: whether stress is computed; conservative models only.
            compute_virials: whether atomic virials are computed; conservative models only.
            create_graph: whether derivatives can be differentiated, for training on them; default: in training mode.

        Raises:
            UnsupportedElementError: an element the potential was not trained on.
            ConfigError: stress of a direct-force model, or a neighbor list that is too short.
        """
        if (compute_stress or compute_virials) and not self.config.is_conservative:
            raise ConfigError("a direct-force model has no stress: train with forces: conservative")
        dtype = self.dtype
        create_graph = self.training if create_graph is None else create_graph
        differentiate = self.config.is_conservative and (compute_forces or compute_stress or compute_virials)
        num_systems = batch.ptr.numel() - 1
        graph = self.graph_of(batch, neighbors) if graph is None else graph
        positions, cell = batch.positions.to(torch.float64), batch.cell.to(torch.float64)
        scale = self.atomic_scale(batch)
        dataset = self._dataset_codes(batch) if self.config.num_energy_heads > 1 else None
        weight = scale.to(dtype).expand(graph.num_atoms).contiguous()
        learning = torch.is_grad_enabled() and (create_graph or not differentiate)
        check_precision(self.precision, dtype, self.device)
        request = EvaluationRequest(differentiate, create_graph, learning, self.precision, self.recompute)

        with torch.enable_grad() if differentiate else torch.set_grad_enabled(torch.is_grad_enabled()):
            vectors = displacements(positions, cell, batch.batch, graph)  # (T + X, 3)
            inputs = EvaluationInputs(vectors, weight, AtomInputs.of_batch(batch, dataset), graph)
            output, gradient = self.evaluator(self.model, inputs, request)
            offsets = self.atomic_references(batch) + self.atomic_shifts(batch)
            atomic_energies = offsets + scale * output.energy.double()
            pairs = (self.repulsion, self.core_guard, self.bond_guard)
            core = repel(pairs, vectors, graph, batch.atomic_numbers)
            if core is not None:
                atomic_energies = atomic_energies + core[0]
                gradient = None if gradient is None else gradient + core[1]
            energy = sum_rows(atomic_energies, batch.batch, num_systems)
            forces, stress = None, None
            if gradient is not None and compute_forces:
                forces = forces_of(gradient, graph).to(dtype)
            if gradient is not None and compute_stress:
                virial = sum_rows(vectors.unsqueeze(2) * gradient.unsqueeze(1), batch.batch[graph.center], num_systems)
                stress = stress_of(virial, cell, batch.pbc).to(dtype)
            virials = virials_of(vectors, gradient, graph) if gradient is not None and compute_virials else None
            if output.forces is not None and compute_forces:
                direct = scale.unsqueeze(-1) * output.forces.double()
                forces = (direct if core is None else direct + forces_of(core[1], graph)).to(dtype)
        properties = {name: self._of_target(name, x, batch) for name, x in output.properties.items()}
        if differentiate and not create_graph:
            energy, atomic_energies = energy.detach(), atomic_energies.detach()
            properties = {name: x.detach() for name, x in properties.items()}
        return Prediction(energy, forces, stress, atomic_energies, virials, properties)

    @staticmethod
    def _of_target(name: str, values: Tensor, batch: StructureBatch) -> Tensor:
        """Sums per-atom values ``(N, ...)`` to ``(B, ...)`` for targets of the structure."""
        return values if TARGETS[name].per_atom else sum_rows(values, batch.batch, batch.ptr.numel() - 1)

    def graph_of(self, batch: StructureBatch, neighbors: NeighborList | None = None, graph_skin: float = 0.0) -> Graph:
        """Checks a batch and builds its graph: see ``escaip.graph.build_graph``.

        Raises:
            UnsupportedElementError: an element the potential was not trained on.
            ConfigError: ``graph_skin`` for a model whose neighbors enter with a weight (as published).
            DataError: an invalid structure.
        """
        self.config.check_graph_skin(graph_skin)
        self.check_systems(batch)
        return build_graph(batch, self.config.graph, neighbors or attached_neighbors(batch), graph_skin)

    def check_systems(self, batch: StructureBatch) -> None:
        """Checks elements, total charges and spin multiplicities of a batch.

        Raises:
            UnsupportedElementError: an element the potential was not trained on.
            DataError: a multiplicity or charge out of range; or a charge, and the model is not conditioned on it.
        """
        check_elements(batch.atomic_numbers, self.supported, self.metadata.elements)
        check_charges(batch.charge, batch.structure_id, self.config.charge)
        self.model.check_systems(batch.charge, batch.spin_multiplicity)

    def compile(self, *_: Any, cuda_graphs: bool = False, **__: Any) -> None:
        """Compiles energy and forces into one graph; the first evaluation of each kind takes a minute or two.

        Answers are those of the uncompiled potential to rounding, for batches of any size without compiling again. On a
        CPU predictions are compiled once per configuration, user and machine, and kept. Evaluations that recompute, and
        those whose positions require gradients (for Hessians), are not compiled.

        Args:
            cuda_graphs: launch predictions on CUDA as one CUDA graph instead of hundreds of kernels, which is what
                small systems wait for. For simulations: each size far from those met before is recorded anew.

        Raises:
            ConfigError: ``cuda_graphs`` for a potential that is not on CUDA.
        """
        self.evaluator = compiled(self.evaluator, self.device, cuda_graphs)

    def predict(
        self,
        structures: Iterable[Any],
        *,
        compute_forces: bool = True,
        compute_stress: bool = False,
        max_atoms: int | None = None,
        progress: bool = False,
    ) -> list[StructurePrediction]:
        """Predicts each of any number of structures, in the order given, as many at once as pay and fit into memory.

        Each result has ``energy`` (eV), ``forces (n, 3)`` (eV/Å), ``stress (3, 3)`` (eV/Å³) and ``atomic_energies
        (n,)`` on the CPU. Arguments and errors: ``escaip.potential.predict.predict_pairs``; for streams,
        ``escaip.potential.predict.iter_predict``.
        """
        return list(
            iter_predict(
                self, structures, compute_forces=compute_forces, compute_stress=compute_stress, max_atoms=max_atoms,
                progress=progress,
            )
        )  # fmt: skip

    def hessian(self, structure: Any, **options: Any) -> Tensor:
        """``(3n, 3n)`` float64 eV/Å² of a structure on the CPU: see ``escaip.potential.hessian.hessian``."""
        return hessian(self, structure, **options)

    def describe(self) -> dict[str, Any]:
        """Returns everything but the weights as plain JSON values (docs/howto/files.md)."""
        return describe(kind_of(self.config).name, self.config, self.metadata)

    def _repr_html_(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        forces = "conservative" if self.config.is_conservative else "direct"
        elements = " ".join(chemical_symbols[z] for z in self.metadata.elements)
        rows = {
            "model": f"{kind_of(self.config).name}, {count:,} parameters, {forces} forces",
            "elements": elements or "any (untrained)",
            "level of theory": self.metadata.level_of_theory,
            "data sets": " ".join(self.metadata.datasets) or "unknown",
            "cutoff": f"{self.cutoff:g} Å",
            "device": f"{self.device}, {str(self.dtype).removeprefix('torch.')}",
        }
        return html_table(list(rows.items()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, config, units, references and provenance to one file (docs/howto/files.md).

        Raises:
            CheckpointError: the file cannot be written.
        """
        write_model_file(path, self.describe(), self.state_dict())


def origin_of(potentials: Sequence[Potential]) -> dict[str, str]:
    """Returns the values of ``ORIGIN`` that are known; those of several potentials are joined by semicolons."""
    found: dict[str, list[str]] = {name: [] for name in ORIGIN}
    for potential in potentials:
        level = potential.metadata.level_of_theory
        values = (*(potential.source or ("", "")), "" if level == "unknown" else level, potential.dataset or "")
        for name, value in zip(ORIGIN, values, strict=True):
            found[name].append(value)
    joined = {name: "; ".join(filter(None, dict.fromkeys(values))) for name, values in found.items()}
    return {name: text for name, text in joined.items() if text}


def missing_energies(references: Tensor) -> dict[str, Tensor]:
    """Returns zeros for what older files lack: shifts before version 3, energies of charges before version 7."""
    charges = references.new_zeros(*references.shape[:-1], 2 * MAX_CHARGE + 1, dtype=torch.float64)
    return {"element_shifts": torch.zeros_like(references, dtype=torch.float64), "charge_energies": charges}


def build_potential(description: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Potential:
    """Builds a potential from the contents of a file, on the CPU, in training mode as any new module.

    Args:
        description: of any schema.
        weights: by name.
        path: of the file, for messages.

    Raises:
        CheckpointError: a schema, model or head that is unknown here, or weights that do not fit the description.
    """
    description = migrate(description, path)
    try:
        config = kind_named(description["architecture"]).config.from_dict(description["config"])
        potential = Potential(config, metadata=PotentialMetadata.from_dict(description["metadata"]))
        floating = [tensor.dtype for name, tensor in weights.items() if name.startswith("model.")]
        if floating:
            potential = potential.to(floating[0])
        # One set of references, or one for each of several: the file says.
        weights = {**missing_energies(weights["element_references"]), **weights}
        for name in ENERGY_BUFFERS:
            setattr(potential, name, torch.zeros_like(weights[name], dtype=torch.float64))
        potential.load_state_dict(weights)
    except EscaipError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not describe a whole potential ({first_line(error)})") from error
    return potential
