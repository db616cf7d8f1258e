"""Several potentials as one ASE calculator that reports how much they disagree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.calculators.ase import DEFAULT_SKIN, EScAIPCalculator, PotentialCalculator, has_volume
from escaip.errors import ConfigError
from escaip.graph.skin import GraphCache, VerletList
from escaip.potential import Potential
from escaip.types import TARGETS, GraphSettings, Prediction, StructureBatch


class CommitteeCalculator(PotentialCalculator):
    """The mean of several potentials, and their spread.

    ``energy``, ``energies``, ``forces``, ``stress`` and, on request, ``stresses`` are means over the members. The
    forces are derivatives of the mean energy, so dynamics conserves it. Further properties:

    ============== ============= ============================================================================
    energy_spread  eV            standard deviation of the members' energies
    forces_spread  (N,) eV/Å     ``√⟨|F_i − ⟨F_i⟩|²⟩`` of each atom, the model deviation of Zhang et al.,
                                 Phys. Rev. Mater. 3, 023804 (2019)
    member_energy  (M,) eV       energy of each member
    member_forces  (M, N, 3)     eV/Å
    member_stress  (M, 6)        eV/Å³, where stress is defined
    ============== ============= ============================================================================

    Spreads divide by ``M`` members, not ``M − 1``. Agreement within a committee does not make extrapolation safe: the
    members can be wrong together. ``energy_spread`` is meaningful for members with the same atomic energies. Heads that
    all members have are averaged.

    Members share one neighbor search, and those with equal graph settings share the graph.

    Args:
        models: two or more, each as in ``EScAIPCalculator``.
        device, dtype, compile, skin, graph_skin: of every member, as there.
        options: ``dataset, precision, cuda_graphs, charge, spin`` of every member, as there.

    Attributes:
        members: one calculator each, which can be used alone.

    Raises:
        ConfigError: fewer than two members, or members on different devices.
        EscaipError: as for ``EScAIPCalculator``.
    """

    implemented_properties = [  # noqa: RUF012 - ASE's name
        "energy", "free_energy", "energies", "forces", "stress", "stresses", "energy_spread", "forces_spread",
        "member_energy", "member_forces", "member_stress",
    ]  # fmt: skip
    _rebuilt = ("_lock", "_neighbors", "_graphs", "_checked")

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str] | Potential],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        *,
        skin: float = DEFAULT_SKIN,
        graph_skin: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(models, (str, os.PathLike, Potential)) or len(models) < 2:
            raise ConfigError("a committee needs at least two models: give a list of them")
        self.members = tuple(
            EScAIPCalculator(model, device, dtype, compile, skin=skin, graph_skin=graph_skin, **options)
            for model in models
        )
        self._given = self.members[0]._given
        self.skin, self.graph_skin = float(skin), float(graph_skin)
        devices = {str(potential.device) for potential in self.potentials}
        if len(devices) > 1:
            raise ConfigError(f"members are on different devices ({', '.join(sorted(devices))}): set device")
        if not self.is_conservative:
            self.implemented_properties = [name for name in self.implemented_properties if "stress" not in name]
        shared = set.intersection(*(set(potential.config.heads) for potential in self.potentials))
        self.implemented_properties = [*self.implemented_properties, *sorted(shared)]
        self._forget()

    @property
    def potentials(self) -> Sequence[Potential]:
        """The potential of each member."""
        return [member.potential for member in self.members]

    @property
    def num_neighbor_builds(self) -> int:
        """Neighbor searches made so far, for all members."""
        return self._neighbors.num_builds

    @property
    def num_graph_builds(self) -> int:
        """Graphs built so far, for all members."""
        return sum(graph.num_builds for graph in self._graphs.values())

    def _forget(self) -> None:
        super()._forget()
        reaches = [potential.search_cutoff + self.graph_skin for potential in self.potentials]
        self._neighbors = VerletList(max(reaches), self.skin)
        self._graphs: dict[GraphSettings, GraphCache] = {}
        self._checked: StructureBatch | None = None
        for potential, reach in zip(self.potentials, reaches, strict=True):
            graph = GraphCache(potential.graph_of, reach, self.graph_skin)
            self._graphs.setdefault(potential.config.graph, graph)

    def _evaluate(self, atoms: Atoms, properties: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
        with_stress = self.is_conservative and has_volume(atoms)
        with_stresses = with_stress and "stresses" in properties
        self.members[0]._has_warned |= self._has_warned
        batch, place = self.members[0].update_batch(atoms, changes)
        if batch is not self._checked:  # another structure
            self._neighbors.reset()
            for graph in self._graphs.values():
                graph.reset()
            for potential in self.potentials:  # a shared graph is checked for one of its potentials only
                potential.check_systems(batch)
            self._checked = batch
        with torch.no_grad():
            # Without a skin each graph searches for neighbors while it is built.
            graphs = {
                settings: graph.get(batch, place, lambda: self._neighbors.get(batch, place))
                for settings, graph in self._graphs.items()
            }
            predictions = [
                potential(
                    batch, graph=graphs[potential.config.graph], compute_stress=with_stress,
                    compute_virials=with_stresses, create_graph=False,
                )
                for potential in self.potentials
            ]  # fmt: skip
        results = _results(predictions, with_stress)
        for name in set.intersection(*(set(prediction.properties) for prediction in predictions)):
            values = torch.stack([prediction.properties[name].detach().double() for prediction in predictions])
            mean = values.mean(dim=0).cpu().numpy()
            results[name] = mean if TARGETS[name].per_atom else mean[0]
        if with_stresses:
            virials = _of_members(predictions, "atomic_virials").mean(axis=0)
            results["stresses"] = full_3x3_to_voigt_6_stress(virials) / atoms.get_volume()
        return results


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
        "forces_spread": np.sqrt(forces.var(axis=0).sum(axis=-1)),
        "member_energy": energy,
        "member_forces": forces,
    }
    if with_stress:
        stress = full_3x3_to_voigt_6_stress(_of_members(predictions, "stress")[:, 0])
        results |= {"stress": stress.mean(axis=0), "member_stress": stress}
    return results
