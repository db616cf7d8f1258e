"""NequIP with random weights, through its ASE calculator: eager, or compiled ahead of time by its own means."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from nequip.integrations.ase import NequIPCalculator
from nequip.integrations.utils import basic_transforms, handle_chemical_species_map
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state
from tasks import CalculatorTask, Structure, Task, count_parameters

CUTOFF = 6.0
# "small" is the smallest of the package's foundation models; "medium" has the layers and degrees of its preset M with
# features for less than a million parameters.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"num_layers": 2, "l_max": 1, "num_features": [128, 64]},
    "medium": {"num_layers": 4, "l_max": 2, "num_features": [64, 32, 16]},
}
SHARED = {"parity": False, "type_embed_num_features": 32, "radial_mlp_depth": 1, "radial_mlp_width": 128}


class NequIPModel:
    """Options: ``size``, one of SIZES; ``compiled``."""

    def __init__(self, size: str, compiled: bool = False) -> None:
        set_global_state(allow_tf32=False)
        self.names = chemical_symbols[1:95]
        self.model = NequIPGNNModel(
            seed=0, model_dtype="float32", r_max=CUTOFF, type_names=self.names, avg_num_neighbors=60.0,
            per_type_energy_scales=1.0, per_type_energy_shifts=0.0, **SHARED, **SIZES[size],
        ).eval()  # fmt: skip
        self.parameters = count_parameters(self.model)
        self.notes = [f"cutoff {CUTOFF:g} Å"]
        self.compiled = compiled
        self._folder = tempfile.TemporaryDirectory()
        self._file: Path | None = None

    def inference(self, structure: Structure) -> Task:
        species = handle_chemical_species_map(True, self.names)
        transforms = basic_transforms(self.model.metadata, CUTOFF, self.names, species)
        eager = NequIPCalculator(model=self.model, device="cpu", transforms=transforms)
        if not self.compiled:
            return CalculatorTask(eager, structure)
        if self._file is None:
            self._file = self._export(eager)
        return CalculatorTask(
            NequIPCalculator.from_compiled_model(self._file, device="cpu", chemical_species_to_atom_type_map=True),
            structure,
        )

    def training(self, structures: list[Structure]) -> Task:
        raise NotImplementedError("training steps of NequIP are not part of this comparison")

    def _export(self, eager: NequIPCalculator) -> Path:
        """What ``nequip-compile --mode aotinductor --target ase`` does after it has read a file."""
        from ase.build import bulk
        from nequip.scripts._compile_utils import AOTI_ASE_TARGET, COMPILE_TARGET_DICT
        from nequip.scripts.compile import _parse_bounds_to_Dim
        from nequip.utils.aot import aot_export_model
        from nequip.utils.global_state import get_latest_global_state

        target = COMPILE_TARGET_DICT[AOTI_ASE_TARGET]
        example = bulk("Cu", cubic=True).repeat(2)
        example.rattle(0.05, seed=0)
        bounds = {"graph": "num_frames", "node": "num_nodes", "edge": "num_edges"}
        dims = {key: _parse_bounds_to_Dim(name, "2,inf") for key, name in bounds.items()}
        state = get_latest_global_state(only_metadata_related=True)
        metadata = {
            key: str(int(value)) if isinstance(value, bool) else str(value)
            for key, value in {**self.model.metadata, **state}.items()
        }
        path = Path(self._folder.name) / "model.nequip.pt2"
        aot_export_model(
            model=self.model,
            device=torch.device("cpu"),
            input_fields=target["input"],
            output_fields=target["output"],
            data=target["data_settings"](eager.atoms_to_data(example)),
            batch_map=target["batch_map_settings"](dims),
            output_path=str(path),
            inductor_configs={"aot_inductor.metadata": metadata},
        )
        return path


def build(options: dict[str, Any]) -> NequIPModel:
    return NequIPModel(**options)
