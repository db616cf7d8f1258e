"""Several potentials as one ASE calculator, which knows how much they disagree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.calculators.ase import EScAIPCalculator, check_stress, has_volume
from escaip.calculators.skin import Place, SkinnedGraph, SkinnedNeighbors
from escaip.errors import ConfigError
from escaip.potential import Potential
from escaip.potential.atomic_energies import check_elements
from escaip.types import Graph, GraphSettings, Prediction

SPREADS = ("energy_spread", "forces_spread")
_SKIN = 0.5


class CommitteeCalculator(Calculator):
    """The mean of several potentials, and their spread.

    ``energy``, ``energies``, ``forces``, ``stress`` and, where they are asked for, ``stresses`` are means over the
    members: forces are derivatives of the mean energy, so that dynamics conserves it. Beside them, by
    :meth:`get_property` or in ``results``:

    ============== ============= ============================================================================
    energy_spread  eV            standard deviation of the members' energies
    forces_spread  (N,) eV/Å     ``√⟨|F_i − ⟨F_i⟩|²⟩`` of each atom: the norm of the standard deviation, the model
                                 deviation of Zhang et al., Phys. Rev. Mater. 3, 023804 (2019)
    member_energy  (M,) eV       each member's
    member_forces  (M, N, 3)     eV/Å
    member_stress  (M, 6)        eV/Å³, where there is stress
    ============== ============= ============================================================================

    A deviation is over the ``M`` members (not ``M − 1``). It is large where the training data of all say little; where
    they are wrong together it is small. ``energy_spread`` has a meaning for members with the same references.

    Members search for neighbors once, and those whose graph settings are equal share the graph.

    Args:
        models: two or more, each as in :class:`~escaip.EScAIPCalculator`.
        device, dtype, compile, skin, dataset, precision, graph_skin, cuda_graphs: of every member, as there.

    Attributes:
        members: a calculator each, which can be used alone.

    Raises:
        ConfigError: fewer than two members, or on different devices.
        EscaipError: see :class:`~escaip.EScAIPCalculator`.
    """

    implemented_properties = [  # noqa: RUF012 - ASE's name
        "energy", "free_energy", "energies", "forces", "stress", "stresses", *SPREADS, "member_energy",
        "member_forces", "member_stress",
    ]  # fmt: skip
    ignored_changes = EScAIPCalculator.ignored_changes

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str] | Potential],
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
        if isinstance(models, (str, os.PathLike, Potential)) or len(models) < 2:
            raise ConfigError("a committee needs at least two models: give a list of them")
        self.members = tuple(
            EScAIPCalculator(
                model, device, dtype, compile, skin=skin, dataset=dataset, precision=precision, graph_skin=graph_skin,
                cuda_graphs=cuda_graphs,
            )
            for model in models
        )  # fmt: skip
        self.skin, self.graph_skin = float(skin), float(graph_skin)
        devices = {str(member.potential.device) for member in self.members}
        if len(devices) > 1:
            raise ConfigError(f"members are on different devices ({', '.join(sorted(devices))}): set device")
        if not self.is_conservative:
            self.implemented_properties = [name for name in self.implemented_properties if "stress" not in name]
        self._forget()

    @property
    def is_conservative(self) -> bool:
        """Whether the forces of all members are derivatives of their energies."""
        return all(member.potential.config.is_conservative for member in self.members)

    @property
    def num_neighbor_builds(self) -> int:
        """Neighbor searches made so far, for all members."""
        return self._neighbors.num_builds

    @property
    def num_graph_builds(self) -> int:
        """Graphs built so far, for all members."""
        return sum(graph.num_builds for graph in self._graphs.values())

    def _forget(self) -> None:
        """Forgets what the next evaluation makes anew."""
        self._neighbors = SkinnedNeighbors(
            max(member.potential.search_cutoff for member in self.members) + self.graph_skin, self.skin
        )
        self._graphs: dict[GraphSettings, SkinnedGraph] = {}
        self._checked: Any = None
        for member in self.members:
            potential = member.potential
            reach = potential.search_cutoff + self.graph_skin
            graph = SkinnedGraph(potential.graph_of, reach, self.graph_skin)
            self._graphs.setdefault(potential.config.graph, graph)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Says what changed since the last evaluation, see :meth:`EScAIPCalculator.check_state`."""
        changes = list(super().check_state(atoms, tol))
        before = self.atoms
        if before is not None and any(m._charge_and_spin(atoms) != m._charge_and_spin(before) for m in self.members):
            changes.append("charge_and_spin")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """ASE's entry; says why there is no stress where there is none.

        Raises:
            PropertyNotImplementedError: stress of a committee with a direct-force member, or of a structure without
                periodic axes.
        """
        if name in ("stress", "stresses", "member_stress"):
            check_stress(self.is_conservative, atoms if atoms is not None else self.atoms)
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluates every member; ``atoms`` is not changed.

        Raises:
            UnsupportedElementError: an element that a member was not trained on.
            DataError: a structure that no potential can mean.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        with_stress = self.is_conservative and has_volume(self.atoms)
        with_stresses = with_stress and "stresses" in properties
        batch, place = self.members[0]._to_batch(self.atoms, system_changes)
        if batch is not self._checked:  # another structure
            self._neighbors.reset()
            for graph in self._graphs.values():
                graph.reset()
            for member in self.members:  # building a graph checks it for one of those that share it
                _check(member.potential, batch)
            self._checked = batch
        with torch.no_grad():
            graphs = self._current_graphs(batch, place)
            predictions = [
                member.potential(
                    batch, graph=graphs[member.potential.config.graph], compute_stress=with_stress,
                    compute_virials=with_stresses, create_graph=False,
                )
                for member in self.members
            ]  # fmt: skip
        self.results = _results(predictions, with_stress)
        if with_stresses:
            virials = _of_members(predictions, "atomic_virials").mean(axis=0)
            self.results["stresses"] = full_3x3_to_voigt_6_stress(virials) / self.atoms.get_volume()

    def _current_graphs(self, batch: Any, place: Place) -> dict[GraphSettings, Graph]:
        # Without a skin each graph searches for itself, on its way.
        return {
            settings: graph.get(batch, place, lambda: self._neighbors.get(batch, place))
            for settings, graph in self._graphs.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the next evaluation makes anew."""
        made = ("_neighbors", "_graphs", "_checked")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _check(potential: Potential, batch: Any) -> None:
    check_elements(batch.atomic_numbers, potential.supported, potential.metadata.elements)
    potential.model.check_systems(batch.charge, batch.spin_multiplicity)


def _of_members(predictions: Sequence[Prediction], name: str) -> np.ndarray:
    values = torch.stack([getattr(prediction, name).detach().double() for prediction in predictions])
    return values.cpu().numpy()


def _results(predictions: Sequence[Prediction], with_stress: bool) -> dict[str, Any]:
    energy, forces = _of_members(predictions, "energy")[:, 0], _of_members(predictions, "forces")
    results = {
        "energy": float(energy.mean()),
        "free_energy": float(energy.mean()),
        "energies": _of_members(predictions, "atomic_energies").mean(axis=0),
        "forces": forces.mean(axis=0),
        "energy_spread": float(energy.std()),
        "forces_spread": spread_of(forces),
        "member_energy": energy,
        "member_forces": forces,
    }
    if with_stress:
        stress = full_3x3_to_voigt_6_stress(_of_members(predictions, "stress")[:, 0])
        results |= {"stress": stress.mean(axis=0), "member_stress": stress}
    return results


def spread_of(forces: np.ndarray) -> np.ndarray:
    """``(N,)`` eV/Å: ``√⟨|F_i − ⟨F_i⟩|²⟩`` from the forces ``(M, N, 3)`` of the members."""
    return np.sqrt(forces.var(axis=0).sum(axis=-1))
