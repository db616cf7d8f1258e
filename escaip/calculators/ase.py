"""A potential as an ASE calculator."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.errors import ConfigError, DataError
from escaip.graph import displacements, prune_graph
from escaip.graph.skin import GraphCache, Snapshot, VerletList
from escaip.potential import Potential
from escaip.potential.loading import load_potential
from escaip.potential.potential import origin_of
from escaip.potential.precision import check_precision, resolve_device, resolve_dtype
from escaip.types import TARGETS, StructureBatch

DEFAULT_SKIN = 0.5
"""Å by which neighbor searches reach farther than needed."""
# From this many tokens of a kept graph on, removing masked tokens takes less time than evaluating them: on a
# CPU, and on CUDA, where small evaluations wait for kernel launches.
_TIGHT_FROM = (0, 10_000)


class PotentialCalculator(Calculator):
    """Base of the calculators of one or several potentials.

    Several threads may share a calculator: a lock is held during each query, so that every thread gets the answer for
    the structure that it asked about. Copies and pickles leave out what the next evaluation rebuilds.
    """

    # Neither enters a potential; total charge and spin do, and check_state compares them.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012
    _rebuilt: tuple[str, ...] = ("_lock",)
    _given: Mapping[str, int] = {}  # charge and spin multiplicity of structures that state none
    _has_warned = False

    @property
    def potentials(self) -> Sequence[Potential]:
        """The potentials that are evaluated."""
        raise NotImplementedError

    @property
    def is_conservative(self) -> bool:
        """Whether all forces are derivatives of energies."""
        return all(potential.config.is_conservative for potential in self.potentials)

    @property
    def origin(self) -> dict[str, Any]:
        """Files, digests and level of theory of the potentials, as far as they are known; charge and spin if given."""
        return {**origin_of(self.potentials), **self._given}

    def stated(self, atoms: Atoms) -> dict[str, int]:
        """Returns total charge and spin multiplicity: those in ``atoms.info``, else those given to the calculator.

        Raises:
            DataError: both state different ones, or there is a charge and a potential is not conditioned on it.
        """
        info = atoms.info
        own = {"charge": info.get("charge"), "spin_multiplicity": info.get("spin_multiplicity", info.get("spin"))}
        found: dict[str, Any] = {"charge": 0, "spin_multiplicity": 1, **self._given}
        for name, value in own.items():
            if value not in (None, self._given.get(name, value)):
                raise DataError(
                    f"{atoms.symbols}: its info states {name} {value}, the calculator {found[name]}: leave out one"
                )
            found[name] = found[name] if value is None else value
        if found["charge"] and not all(potential.config.charge for potential in self.potentials):
            raise DataError(
                f"{atoms.symbols}: total charge is {found['charge']}, which this model does not know: use one trained "
                "with charge: true, or remove info['charge'] to treat it as neutral"
            )
        return found

    def with_state(self, atoms: Atoms) -> Atoms:
        """Returns a copy without calculator whose info holds what ``stated`` returns."""
        self._compare_charges(atoms)
        bare = atoms.copy()
        bare.calc = None  # its results would be read as labels
        bare.info.update(self.stated(atoms))
        return bare

    def _compare_charges(self, atoms: Atoms) -> None:
        """Warns once where the charges of atoms, which are not read, sum to another total; errors as ``stated``."""
        total = self.stated(atoms)["charge"]
        if self._has_warned or not any(potential.config.charge for potential in self.potentials):
            return
        charges = atoms.get_initial_charges()
        if charges.any() and abs(charges.sum() - total) > 0.01:
            self._has_warned = True
            warnings.warn(
                f"{atoms.symbols}: initial_charges sum to {charges.sum():.3g}, but the total charge is {total}: state "
                "it as atoms.info['charge'], or give the calculator charge",
                stacklevel=1,
            )

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """Returns the origin and how it is evaluated, which ASE writes to databases and trajectories."""
        return {
            **self.origin, "dtype": ", ".join(dict.fromkeys(str(one.dtype) for one in self.potentials)),
            "precision": ", ".join(dict.fromkeys(one.precision for one in self.potentials)),
        }  # fmt: skip

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Names what changed since the last evaluation; charge and spin count where a potential uses them.

        Numbers are compared to the last digit, whatever ``tol`` is, because ASE's comparison takes longer.
        """
        self._compare_charges(atoms)
        before = self.atoms
        if before is None:
            return list(all_changes)
        pairs: dict[str, tuple[Any, Any]] = {
            name: (before.arrays.get(name), atoms.arrays.get(name)) for name in all_changes
        }
        pairs |= {"cell": (before.cell.array, atoms.cell.array), "pbc": (before.pbc, atoms.pbc)}
        changes = [name for name, (old, new) in pairs.items() if old is not new and not np.array_equal(old, new)]
        if self._charge_and_spin(atoms) != self._charge_and_spin(before):
            changes.append("charge_and_spin")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Returns a property of ``atoms``, by default of the structure evaluated last; safe to call from any thread.

        Raises:
            PropertyNotImplementedError: stress or virials of a direct-force model, or stress of a structure without
                periodic axes; the message gives the reason.
        """
        if _is_stress(name) and not self.is_conservative:
            raise PropertyNotImplementedError(
                "a direct-force model has no stress: use a model trained with forces: conservative"
            )
        subject = atoms if atoms is not None else self.atoms
        if "stress" in name and subject is not None and not has_volume(subject):
            raise PropertyNotImplementedError(
                "stress needs a cell with volume and at least one periodic axis: set atoms.cell and atoms.pbc"
            )
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluates the structure; ``atoms`` is not changed.

        Raises:
            UnsupportedElementError: a potential was not trained on an element of the structure.
            DataError: the structure is invalid: NaN coordinates, a cell without volume, ...
        """
        with self._lock:
            super().calculate(atoms, properties, system_changes)
            assert self.atoms is not None
            self.results = self._evaluate(self.atoms, properties, system_changes)

    def _evaluate(self, atoms: Atoms, properties: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def _forget(self) -> None:
        """Sets the attributes named in ``_rebuilt`` to their initial state."""
        self._lock = threading.RLock()

    def _charge_and_spin(self, atoms: Atoms) -> tuple[Any, Any]:
        configs = [potential.config for potential in self.potentials]
        charge = atoms.info.get("charge", 0) if any(config.charge for config in configs) else 0
        spin = atoms.info.get("spin_multiplicity", atoms.info.get("spin", 1))
        return charge, spin if any(config.spin for config in configs) else 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class EScAIPCalculator(PotentialCalculator):
    """Energies, forces and stress of a potential for ``ase.Atoms``.

    The neighbor list is kept with a skin and rebuilt when a pair could be missing; answers do not depend on it. With
    ``graph_skin`` the graph is kept as well, which saves waits for a GPU.

    Charge and spin multiplicity are read from ``atoms.info`` (``"charge"``, ``"spin_multiplicity"`` or ``"spin"``)
    by potentials that use them; ``charge`` and ``spin`` are for structures that state none. Every evaluation gives
    forces and, for structures with a periodic cell, stress, so that constant-pressure runs evaluate once per step. Two
    properties are evaluated only on request: ``stresses``
    ``(N, 6)`` eV/Å³, each atom's share of the stress (``escaip.potential.derivatives.virials_of``), and
    ``virials`` ``(N, 3, 3)`` eV, which is ``−V`` times that and is defined for molecules too. Further heads of the
    model are properties by the name of their target (``escaip.types.TARGETS``), such as ``"dipole"``.

    Args:
        model: a ``.ckpt`` or ``.escaip`` file, or a ``Potential``, which is copied.
        device: a torch device; ``"auto"`` takes CUDA where there is one.
        dtype: ``"float32"`` or ``"float64"``; by default as stored.
        compile: compile energy and forces into one graph at the first evaluation, which then takes a minute or two (on
            a CPU once per configuration, user and machine); worth it for runs of thousands of steps.
        skin: Å by which the neighbor search reaches farther than needed; 0 searches at every evaluation.
        dataset: data set whose atomic energies are used, for potentials trained on several.
        precision: ``"highest"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"`` (docs/howto/speed.md); by default the
            potential's, which is the highest for a file.
        graph_skin: Å by which distances may change before the tokens are chosen again; 0 chooses them at every
            evaluation. For CUDA, where building a graph takes longer than evaluating a small system. Answers depend on
            it by rounding.
        cuda_graphs: with ``compile``, on CUDA: one launch for each evaluation (``compile``).
        charge: total charge in e; by default that of the structure, or 0.
        spin: multiplicity ``2S + 1``; by default that of the structure, or 1.

    Attributes:
        potential: the potential, with its weights frozen.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe.
        ConfigError: no such device or dtype, a precision that they do not have, a negative skin, a graph skin for
            a model whose neighbors enter with a jump, or a charge or spin for a model that is not conditioned on it.
    """

    implemented_properties = [  # noqa: RUF012 - ASE's name
        "energy", "free_energy", "energies", "forces", "stress", "stresses", "virials",
    ]  # fmt: skip
    _rebuilt = ("_lock", "_batch", "_snapshot", "_neighbors", "_graph")

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        *,
        skin: float = DEFAULT_SKIN,
        dataset: str | None = None,
        precision: str | None = None,
        graph_skin: float = 0.0,
        cuda_graphs: bool = False,
        charge: int | None = None,
        spin: int | None = None,
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
        self._given = _given(self.potential, charge, spin)
        self.skin, self.graph_skin = float(skin), float(graph_skin)
        self.potential.config.check_graph_skin(self.graph_skin)
        if not self.is_conservative:
            self.implemented_properties = [name for name in self.implemented_properties if not _is_stress(name)]
        self.implemented_properties = [*self.implemented_properties, *self.potential.config.heads]
        self._forget()

    @property
    def potentials(self) -> Sequence[Potential]:
        """The potential alone."""
        return (self.potential,)

    @property
    def num_neighbor_builds(self) -> int:
        """Neighbor searches made so far."""
        return self._neighbors.num_builds

    @property
    def num_graph_builds(self) -> int:
        """Graphs built so far."""
        return self._graph.num_builds

    def _forget(self) -> None:
        super()._forget()
        reach = self.potential.search_cutoff + self.graph_skin
        self._neighbors = VerletList(reach, self.skin)
        self._graph = GraphCache(self.potential.graph_of, reach, self.graph_skin)
        self._batch: Any = None
        self._snapshot: Snapshot | None = None

    def _evaluate(self, atoms: Atoms, properties: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
        with_stress = self.is_conservative and has_volume(atoms)
        with_virials = "virials" in properties or (with_stress and "stresses" in properties)
        batch, place = self.update_batch(atoms, changes)
        with torch.no_grad():
            graph = self._graph.get(batch, place, lambda: self._neighbors.get(batch, place))
            if self.graph_skin > 0.0 and graph.num_tokens >= _TIGHT_FROM[batch.positions.is_cuda]:
                vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
                graph = prune_graph(graph, vectors, self.potential.config.graph)
            prediction = self.potential(
                batch, graph=graph, compute_stress=with_stress, compute_virials=with_virials, create_graph=False
            )
        assert prediction.forces is not None
        parts = [prediction.energy, prediction.atomic_energies, prediction.forces]
        if with_stress:
            assert prediction.stress is not None
            parts.append(prediction.stress)
        # A single copy from the device, so that the host waits once.
        values = torch.cat([part.detach().double().reshape(-1) for part in parts]).cpu().numpy()
        count = len(batch.positions)
        results: dict[str, Any] = {
            "energy": float(values[0]),
            "free_energy": float(values[0]),
            "energies": values[1 : 1 + count],
            "forces": values[1 + count : 1 + 4 * count].reshape(-1, 3),
        }
        for name, value in prediction.properties.items():
            array = value.detach().double().cpu().numpy()
            results[name] = array if TARGETS[name].per_atom else array[0]
        if with_stress:
            results["stress"] = full_3x3_to_voigt_6_stress(values[-9:].reshape(3, 3))
        if with_virials:
            assert prediction.atomic_virials is not None
            results["virials"] = -prediction.atomic_virials.detach().cpu().numpy()
            if with_stress:
                results["stresses"] = full_3x3_to_voigt_6_stress(results["virials"] / -atoms.get_volume())
        return results

    def get_hessian(self, atoms: Atoms | None = None, **options: Any) -> np.ndarray:
        """``(3n, 3n)`` float64 eV/Å², ``∂²E/∂r²`` by automatic differentiation; constraints are ignored.

        Args:
            atoms: by default those of the last evaluation.
            **options: of ``escaip.potential.hessian.hessian``.

        Raises:
            ConfigError: a direct-force model without ``method="finite_differences"``, or no atoms so far.
            DataError: as ``escaip.potential.hessian.hessian``.
        """
        subject = atoms if atoms is not None else self.atoms
        if subject is None:
            raise ConfigError("no structure so far: call get_hessian(atoms)")
        return self.potential.hessian(self.with_state(subject), **options).numpy()

    def update_batch(self, atoms: Atoms, changes: Sequence[str]) -> tuple[StructureBatch, Snapshot]:
        """Returns the structure as a batch on the device, updating only what changed, and its positions on the host."""
        from escaip.data import AtomicData, collate

        if self._batch is None or not set(changes) <= {"positions", "cell"}:
            batch = collate([AtomicData.from_ase(self.with_state(atoms))])
            self._snapshot = Snapshot.of(batch)
            self._batch = batch.to(self.potential.device)
            self._neighbors.reset()
            self._graph.reset()
            return self._batch, self._snapshot
        if not np.isfinite(atoms.positions).all():
            index = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
            raise DataError(f"{atoms.symbols}: coordinates of atom {index} are NaN or infinite: repair the structure")
        assert self._snapshot is not None
        positions, cell = torch.from_numpy(atoms.positions.copy()), torch.from_numpy(atoms.cell.array.copy())
        self._snapshot = Snapshot(positions, cell, self._snapshot.pbc)
        # Nothing writes to the copies on the host, so there is no need to wait for the transfer.
        self._batch.positions = positions.to(self.potential.device, non_blocking=True)
        self._batch.cell = cell[None].to(self.potential.device, non_blocking=True)
        return self._batch, self._snapshot


def _own_potential(
    model: str | os.PathLike[str] | Potential, device: str | torch.device, dtype: str | torch.dtype | None
) -> Potential:
    """Returns a copy that belongs to the calculator, with frozen weights."""
    if not isinstance(model, Potential):
        return load_potential(model, device=device, dtype=dtype).requires_grad_(False)
    potential = copy.deepcopy(model)
    if dtype is not None:
        potential = potential.to(resolve_dtype(dtype))
    if device != "auto":  # a potential at hand stays where it is
        potential = potential.to(resolve_device(device))
    return potential.eval().requires_grad_(False)


def _given(potential: Potential, charge: int | None, spin: int | None) -> dict[str, int]:
    """Returns charge and spin multiplicity as far as they are given."""
    for name, value, neutral in (("charge", charge, 0), ("spin", spin, 1)):
        if value not in (None, neutral) and not getattr(potential.config, name):
            raise ConfigError(f"{name} is {value}, which this model does not know: use one trained with {name}: true")
    values = {"charge": charge, "spin_multiplicity": spin}
    return {name: value for name, value in values.items() if value is not None}


def _is_stress(name: str) -> bool:
    return "stress" in name or name == "virials"


def has_volume(atoms: Atoms) -> bool:
    """Whether stress is defined: a periodic axis, and a cell with volume."""
    return bool(atoms.pbc.any()) and abs(np.linalg.det(atoms.cell.array)) > 0
