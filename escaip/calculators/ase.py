"""A potential as an ASE calculator."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.calculators.skin import Place, SkinnedGraph, SkinnedNeighbors
from escaip.errors import ConfigError, DataError
from escaip.graph import displacements, tight_graph
from escaip.potential import Potential
from escaip.potential.precision import check_precision

_SKIN = 0.5
# Tokens of a kept graph from which on leaving out those that do not count takes less time than evaluating them, on a
# CPU and on CUDA, where smaller evaluations wait for launches (a guess until a GPU has told).
_TIGHT_FROM = (0, 10_000)
_STRESSES = ("stress", "stresses")


class EScAIPCalculator(Calculator):
    """Energies, forces and stress of a potential for :class:`ase.Atoms`.

    The candidate neighbor list is kept with a skin and rebuilt exactly when it must be; answers do not depend on it.
    With ``graph_skin`` so is the graph itself: an evaluation then waits for the device once, for its results, and once
    more for sizes where it is worth leaving out the tokens that do not count at the moment.
    Charge and spin multiplicity are read from ``atoms.info`` (``"charge"``, ``"spin_multiplicity"`` or ``"spin"``)
    by potentials that use them. Every evaluation gives forces and, with a periodic cell, stress: its cost beside the
    forces is within the noise, and constant-pressure runs then evaluate once per step. ``stresses``, each atom's share
    of the stress (:func:`escaip.potential.derivatives.virials_of`), are evaluated when they are asked for.
    So are ``virials``, ``(N, 3, 3)`` eV: ``−V`` times that, which molecules have as well.

    Args:
        model: a ``.ckpt`` or ``.escaip`` file, or a :class:`~escaip.Potential`, which is copied.
        device: a torch device; ``"auto"`` takes CUDA where there is one.
        dtype: ``"float32"`` or ``"float64"``; by default as stored.
        compile: compile energy and forces into one graph at the first evaluation, which then takes a minute or two (on
            a CPU once per configuration, user and machine); worth it for runs of thousands of steps.
        skin: Å by which the neighbor search reaches farther than needed; 0 searches at every evaluation.
        dataset: whose element references give the energies, for potentials trained on several sets.
        precision: ``"highest"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"`` (docs/precision.md); by default the
            potential's, which of a file is the highest.
        graph_skin: Å by which distances may change before the tokens are chosen again; 0 chooses them at every
            evaluation. For CUDA, where building a graph takes longer than evaluating a small system. Answers depend on
            it by rounding.
        cuda_graphs: with ``compile``, on CUDA: one launch for each evaluation (:meth:`~escaip.Potential.compile`).

    Raises:
        CheckpointError: the file is missing, damaged or unsafe.
        ConfigError: no such device or dtype, a precision that they do not have, a negative skin, or a graph skin for
            a model whose neighbors enter with a jump.
    """

    implemented_properties = [  # noqa: RUF012 - ASE's name
        "energy", "free_energy", "energies", "forces", "stress", "stresses", "virials",
    ]  # fmt: skip
    # Neither enters the potential; total charge and spin do, and check_state sees them.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        *,
        skin: float = _SKIN,
        dataset: str | None = None,
        precision: str | None = None,
        graph_skin: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("skin", skin), ("graph_skin", graph_skin)):
            if not value >= 0.0:
                raise ConfigError(f"{name} is {value}: it must be 0 or more Å")
        self.potential = _own_potential(model, device, dtype)
        if precision is not None:
            check_precision(precision, self.potential.dtype, self.potential.device)
            self.potential.precision = precision
        if compile:
            self.potential.compile(cuda_graphs=cuda_graphs)
        elif cuda_graphs:
            raise ConfigError("cuda_graphs records compiled code: set compile=True as well")
        if dataset is not None:
            self.potential.choose_dataset(dataset)
        if self.potential.datasets and self.potential.dataset is None:
            names = ", ".join(self.potential.datasets)
            raise ConfigError(f"the potential has references for each of {names}: choose one with dataset=NAME")
        self.skin, self.graph_skin = float(skin), float(graph_skin)
        self.potential.config.check_graph_skin(self.graph_skin)
        if not self.potential.config.is_conservative:
            without = (*_STRESSES, "virials")
            self.implemented_properties = [name for name in self.implemented_properties if name not in without]
        self._forget()

    def _forget(self) -> None:
        """Forgets what the next evaluation makes anew."""
        reach = self.potential.search_cutoff + self.graph_skin
        self._neighbors = SkinnedNeighbors(reach, self.skin)
        self._graph = SkinnedGraph(self.potential.graph_of, reach, self.graph_skin)
        self._batch: Any = None
        self._place: Place | None = None

    @property
    def num_neighbor_builds(self) -> int:
        """Neighbor searches made so far."""
        return self._neighbors.num_builds

    @property
    def num_graph_builds(self) -> int:
        """Graphs built so far."""
        return self._graph.num_builds

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Says what changed since the last evaluation; total charge and spin count where the potential uses them."""
        changes = list(super().check_state(atoms, tol))
        if self.atoms is not None and self._charge_and_spin(atoms) != self._charge_and_spin(self.atoms):
            changes.append("charge_and_spin")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """ASE's entry; says why there is no stress where there is none.

        Raises:
            PropertyNotImplementedError: stress of a direct-force model or of a structure without periodic axes, or
                virials of a direct-force model.
        """
        if name in _STRESSES:
            check_stress(self.potential.config.is_conservative, atoms if atoms is not None else self.atoms)
        elif name == "virials":
            check_stress(self.potential.config.is_conservative, None)
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluates the potential; ``atoms`` is not changed.

        Raises:
            UnsupportedElementError: an element that the potential was not trained on.
            DataError: a structure that no potential can mean (NaN coordinates, a cell without volume, ...).
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        with_stress = self.potential.config.is_conservative and has_volume(self.atoms)
        with_virials = "virials" in properties or (with_stress and "stresses" in properties)
        batch, place = self._to_batch(self.atoms, system_changes)
        with torch.no_grad():
            graph = self._graph.get(batch, place, lambda: self._neighbors.get(batch, place))
            if self.graph_skin > 0.0 and graph.num_tokens >= _TIGHT_FROM[batch.positions.is_cuda]:
                vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
                graph = tight_graph(graph, vectors, self.potential.config.graph)
            prediction = self.potential(
                batch, graph=graph, compute_stress=with_stress, compute_virials=with_virials, create_graph=False
            )
        assert prediction.forces is not None
        parts = [prediction.energy, prediction.atomic_energies, prediction.forces]
        if with_stress:
            assert prediction.stress is not None
            parts.append(prediction.stress)
        # One copy from the device, and one wait.
        values = torch.cat([part.detach().double().reshape(-1) for part in parts]).cpu().numpy()
        count = len(batch.positions)
        energy, energies, forces, stress = np.split(values, np.cumsum([1, count, 3 * count]))
        self.results = {
            "energy": float(energy[0]),
            "free_energy": float(energy[0]),
            "energies": energies,
            "forces": forces.reshape(-1, 3),
        }
        if with_stress:
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
        if with_virials:
            assert prediction.atomic_virials is not None
            self.results["virials"] = -prediction.atomic_virials.detach().cpu().numpy()
            if with_stress:
                stresses = self.results["virials"] / -self.atoms.get_volume()
                self.results["stresses"] = full_3x3_to_voigt_6_stress(stresses)

    def get_hessian(self, atoms: Atoms | None = None, **options: Any) -> np.ndarray:
        """``(3n, 3n)`` float64 eV/Å², ``∂²E/∂r²`` by automatic differentiation; constraints are not looked at.

        Args:
            atoms: by default those of the last evaluation.
            **options: of :func:`escaip.potential.hessian.hessian`.

        Raises:
            ConfigError: a direct-force model without ``method="finite_differences"``, or no atoms so far.
            DataError: as :func:`escaip.potential.hessian.hessian`.
        """
        subject = atoms if atoms is not None else self.atoms
        if subject is None:
            raise ConfigError("no structure so far: call get_hessian(atoms)")
        return self.potential.hessian(subject, **options).numpy()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the next evaluation makes anew."""
        made = ("_batch", "_place", "_neighbors", "_graph")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _to_batch(self, atoms: Atoms, changes: Sequence[str]) -> tuple[Any, Place]:
        """The structure on the device, where only what changed is made anew, and where its atoms are, on the host."""
        from escaip.data import AtomicData, collate

        if self._batch is None or not set(changes) <= {"positions", "cell"}:
            batch = collate([AtomicData.from_ase(_bare(atoms))])
            self._place = Place.of(batch)
            self._batch = batch.to(self.potential.device)
            self._neighbors.reset()
            self._graph.reset()
            return self._batch, self._place
        if not np.isfinite(atoms.positions).all():
            index = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
            raise DataError(f"{atoms.symbols}: coordinates of atom {index} are NaN or infinite: repair the structure")
        assert self._place is not None
        positions, cell = torch.from_numpy(atoms.positions.copy()), torch.from_numpy(atoms.cell.array.copy())
        self._place = Place(positions, cell, self._place.pbc)
        # Nothing writes to the copies on the host, so nothing needs to wait until they have arrived.
        self._batch.positions = positions.to(self.potential.device, non_blocking=True)
        self._batch.cell = cell[None].to(self.potential.device, non_blocking=True)
        return self._batch, self._place

    def _charge_and_spin(self, atoms: Atoms) -> tuple[Any, Any]:
        config = self.potential.config
        charge = atoms.info.get("charge", 0) if config.charge else 0
        spin = atoms.info.get("spin_multiplicity", atoms.info.get("spin", 1)) if config.spin else 1
        return charge, spin


def _own_potential(
    model: str | os.PathLike[str] | Potential, device: str | torch.device, dtype: str | torch.dtype | None
) -> Potential:
    """A potential nobody else changes, without gradients of its weights."""
    from escaip.potential.loading import load_potential, resolve_device, resolve_dtype

    if not isinstance(model, Potential):
        return load_potential(model, device=device, dtype=dtype).requires_grad_(False)
    potential = copy.deepcopy(model)
    if dtype is not None:
        potential = potential.to(resolve_dtype(dtype))
    if device != "auto":  # a potential at hand stays where it is
        potential = potential.to(resolve_device(device))
    return potential.eval().requires_grad_(False)


def _bare(atoms: Atoms) -> Atoms:
    """The structure without its calculator, whose results would be read as labels."""
    bare = atoms.copy()
    bare.calc = None
    return bare


def check_stress(is_conservative: bool, atoms: Atoms | None) -> None:
    """Says why there is no stress.

    Raises:
        PropertyNotImplementedError: forces are not derivatives, or the structure has no volume.
    """
    if not is_conservative:
        raise PropertyNotImplementedError(
            "a direct-force model has no stress: use a model trained with forces: conservative"
        )
    if atoms is not None and not has_volume(atoms):
        raise PropertyNotImplementedError(
            "stress needs a cell with volume and at least one periodic axis: set atoms.cell and atoms.pbc"
        )


def has_volume(atoms: Atoms) -> bool:
    """Whether stress has a meaning."""
    return bool(atoms.pbc.any()) and abs(np.linalg.det(atoms.cell.array)) > 0
