"""The table of engines: what it compares, and what it says of engines that are absent."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch-sim's own, at its import
    import engines

from escaip.errors import ConfigError
from escaip.models import EScAIPConfig
from escaip.potential import Potential

TINY = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "angular_channels": (3, 2, 1, 1, 1), "num_radial": 24,
    "distance_size": 12, "element_size": 8, "boo_size": 6, "boo_degrees": 4, "cutoff": 4.0, "num_neighbors": 8,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_engine_agrees_or_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    potential = Potential(EScAIPConfig.from_dict(TINY)).double().eval()
    rows = {row["engine"]: row for row in engines.measure(potential, engines.structure(1), 2, 1)}
    assert list(rows) == list(engines.ENGINES)
    for name, row in rows.items():
        if "absent" in row:
            assert "pip install" in row["absent"]
            continue
        tolerance = {"ASE": 1e-30, "i-PI": 1e-5}.get(name, 1e-8)
        assert max(row[what] for what in ("energy", "forces", "virial", "last_energy", "positions")) < tolerance
        assert row["steps_per_second"] > 0.0
    engines.print_table(list(rows.values()))
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_differences_are_largest_ones_and_positions_are_modulo_the_cell() -> None:
    cell = np.diag([4.0, 5.0, 6.0])
    one = engines.Run(1.0, np.zeros((2, 3)), np.zeros((3, 3)), 2.0, np.zeros((2, 3)), 1.0)
    moved = np.array([[4.0, -5.0, 0.0], [0.0, 0.25, 12.0]])
    other = engines.Run(1.5, np.full((2, 3), -0.1), np.eye(3), 2.0, moved, 1.0)
    found = engines.differences(other, one, cell)
    assert found == pytest.approx({"energy": 0.5, "forces": 0.1, "virial": 1.0, "last_energy": 0.0, "positions": 0.25})


def test_an_engine_that_is_absent_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, here = [], Path.cwd()

    def absent(*_: object) -> engines.Run:
        asked.append(Path.cwd())
        raise ConfigError("not here: pip install it")

    monkeypatch.setattr(engines, "ENGINES", {"it": ("it", absent)})
    potential = Potential(EScAIPConfig.from_dict(TINY))
    assert engines.measure(potential, engines.structure(1), 1, 3) == [
        {"engine": "it", "absent": "not here: pip install it"}
    ]
    assert len(asked) == 1
    assert asked[0] != here
    assert Path.cwd() == here
