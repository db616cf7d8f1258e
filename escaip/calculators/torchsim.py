"""A potential as a model of torch-sim, which runs many systems at once (docs/howto/engines.md)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from escaip.calculators.ase import EScAIPCalculator
from escaip.errors import ConfigError, DataError
from escaip.potential import Potential
from escaip.types import StructureBatch

try:
    from torch_sim.models.interface import ModelInterface
except ImportError:  # reported when a model is made; importing this module needs no torch-sim
    ModelInterface = None

_Base: Any = torch.nn.Module if ModelInterface is None else ModelInterface


class EScAIPModel(_Base):
    """Energies, forces and stresses of every system of a torch-sim state, in one evaluation.

    Charges and spins are ``state.charge`` and ``state.spin_multiplicity`` or ``state.spin``, ``(B,)``, where a state
    has them, else the arguments below. Systems of different size, cell and elements may share a state; its periodic
    axes are common to all. Units are torch-sim's ``metal``: Å, eV, eV/Å, eV/Å³, stress positive in tension.

    Args:
        model: a ``.ckpt`` or ``.escaip`` file, or a ``Potential``, which is copied.
        device: a torch device; ``"auto"`` takes CUDA where there is one.
        state_dtype: of states and answers, not of the potential. Double by default, since displacements and total
            energies of thousands of eV need the digits.
        compute_forces: whether forces are returned.
        compute_stress: whether stress is returned; by default for conservative forces.
        charge: total charge in e, for states without charges.
        spin: multiplicity ``2S + 1``, for states without spins.
        options: of ``EScAIPCalculator`` that concern the potential: ``dtype, compile, dataset,
            precision, cuda_graphs``.

    Raises:
        ConfigError: torch-sim is missing, stress of a direct-force model, or an option that the calculator refuses.
        CheckpointError: the file is missing, damaged or unsafe.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        device: str | torch.device = "auto",
        state_dtype: torch.dtype = torch.float64,
        *,
        compute_forces: bool = True,
        compute_stress: bool | None = None,
        charge: int = 0,
        spin: int = 1,
        **options: Any,
    ) -> None:
        if ModelInterface is None:
            raise ConfigError(
                "torch-sim is not installed: pip install torch-sim-atomistic (0.4 and newer need Python 3.12)"
            )
        super().__init__()
        self.potential = EScAIPCalculator(model, device, charge=charge, spin=spin, **options).potential
        conservative = self.potential.config.is_conservative
        if compute_stress and not conservative:
            raise ConfigError("compute_stress: a direct-force model has no stress: train with forces: conservative")
        self._dtype = state_dtype
        self._compute_forces = compute_forces
        self._compute_stress = conservative if compute_stress is None else compute_stress
        self._charge, self._spin = charge, spin

    @property
    def device(self) -> torch.device:
        """Device of the potential."""
        return self.potential.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of states and answers, not of the potential."""
        return self._dtype

    @property
    def compute_forces(self) -> bool:
        """Whether forces are returned."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether stress is returned."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        if value and not self.potential.config.is_conservative:
            raise NotImplementedError("a direct-force model has no stress: train with forces: conservative")
        self._compute_stress = value

    @property
    def memory_scales_with(self) -> str:
        """Measure of systems for torch-sim's batchers: atoms, where the number of neighbors is bounded."""
        return "n_atoms_x_density" if self.potential.config.graph.num_neighbors is None else "n_atoms"

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Evaluates a state, which is not changed.

        Args:
            state: of torch-sim: ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å whose **columns** are lattice vectors,
                ``pbc``, ``atomic_numbers (N,)``, ``system_idx (N,)``.

        Returns:
            ``energy (B,)`` eV, ``forces (N, 3)`` eV/Å, ``stress (B, 3, 3)`` eV/Å³, NaN without periodic axes, all
            detached and in ``dtype``.

        Raises:
            UnsupportedElementError: an element that the potential was not trained on.
            DataError: an invalid structure, or charges that are not one for each system.
        """
        batch = self._to_batch(state)
        with torch.no_grad():
            prediction = self.potential(
                batch, compute_forces=self._compute_forces, compute_stress=self._compute_stress, create_graph=False
            )
        found = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
        return {name: value.detach().to(self._dtype) for name, value in found.items() if value is not None}

    def _to_batch(self, state: Any) -> StructureBatch:
        """Returns the structures as a batch of this package."""
        from escaip.data.structure import make_batch

        index, cell = state.system_idx, state.cell
        count, systems = len(index), len(cell)
        pbc = torch.as_tensor(state.pbc, dtype=torch.bool, device=cell.device)
        names = [f"system {number}" for number in range(systems)]
        fields = {
            "positions": state.positions.detach().double(),
            "atomic_numbers": state.atomic_numbers.long(),
            "cell": cell.detach().double().transpose(1, 2).contiguous(),
            "pbc": pbc.expand(systems, 3).clone(),
            "charge": self._of_systems(state, ("charge",), self._charge),
            "spin_multiplicity": self._of_systems(state, ("spin_multiplicity", "spin"), self._spin),
            "fixed": torch.zeros(count, dtype=torch.bool),
            "tags": torch.zeros(count, dtype=torch.int64),
            "dataset": torch.full((systems,), -1),
            "structure_id": names,
            "group": names,
        }
        return make_batch(fields, torch.bincount(index, minlength=systems).cpu()).to(self.device)

    def _of_systems(self, state: Any, names: tuple[str, ...], default: int) -> Tensor:
        """Returns ``(B,)`` int64: the first of these names that the state has, else the default."""
        systems = len(state.cell)
        for name in names:
            value = getattr(state, name, None)
            if value is None:
                continue
            whole = value.detach().round().to(torch.int64)
            if value.shape != (systems,) or not bool((whole == value).all()):
                raise DataError(f"state.{name} must be one whole number for each of the {systems} systems: {value}")
            return whole
        return torch.full((systems,), default)
