"""The coordinate check: what moves by the same amount at every width, and what does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from coordinates import check_coordinates
from training_stand_ins import TINY, labelled_molecules

from escaip import EScAIPConfig
from escaip.data.structure import AtomicData, collate
from escaip.errors import ConfigError


@pytest.fixture(scope="module")
def batch() -> Any:
    structures = labelled_molecules(4)
    batch = collate([AtomicData.from_ase(atoms) for atoms in structures])
    batch.energy = batch.energy - batch.energy.mean()
    return batch


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_flat_in_width_with_a_base_width_alone(batch: Any, forces: str) -> None:
    config = EScAIPConfig.from_dict({**TINY, "num_layers": 2, "forces": forces})
    options: dict[str, Any] = {"steps": 3, "learning_rate": 3e-3, "seeds": (0, 1)}
    flat = check_coordinates(config, batch, (32, 64, 128), base_width=32, **options).slopes()
    usual = check_coordinates(config, batch, (32, 64, 128), base_width=None, **options).slopes()
    assert set(flat) == {"block 0", "block 1", "energy", "forces"}
    for block in ("block 0", "block 1"):
        assert abs(flat[block]) < 0.25
        assert usual[block] > 0.4
    assert flat["energy"] < 0.4


@pytest.mark.bad_input
def test_one_width_is_not_compared(batch: Any) -> None:
    with pytest.raises(ConfigError, match="give two or more"):
        check_coordinates(EScAIPConfig.from_dict(TINY), batch, (32,), base_width=32)
