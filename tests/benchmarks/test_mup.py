"""The arithmetic of benchmarks/mup.py: exponents, best rates, the grid that grows, and what is not run again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import mup

from escaip import EScAIPConfig, Potential
from escaip.data.structure import AtomicData, collate
from escaip.errors import ConfigError, TrainingError


def valley(best: float, rates: Sequence[float]) -> dict[float, float | None]:
    """Losses whose logarithm is a parabola in the logarithm of the rate."""
    return {rate: 5.0 * math.exp(0.3 * math.log(rate / best) ** 2) for rate in rates}


@pytest.mark.parametrize("best", [0.003, 0.004, 0.0055])
def test_the_minimum_of_a_parabola_is_found_between_rates(best: float) -> None:
    found = mup.best_rate(valley(best, [0.001, 0.002, 0.004, 0.008, 0.016]))
    assert found["grid"] == 0.004
    assert found["parabola"] == pytest.approx(best, rel=1e-9)


def test_no_parabola_at_an_end_or_beside_a_run_that_diverged() -> None:
    assert mup.best_rate(valley(0.001, [0.001, 0.002, 0.004])) == {"grid": 0.001, "parabola": None}
    assert mup.best_rate({0.001: 3.0, 0.002: 2.0, 0.004: None}) == {"grid": 0.002, "parabola": None}
    assert mup.best_rate({0.001: 2.0, 0.002: 2.0, 0.004: 2.0})["parabola"] is None


def test_the_grid_grows_until_both_ends_are_clearly_worse() -> None:
    assert mup.next_rate({0.002: 2.0, 0.004: 3.0}) == 0.001
    assert mup.next_rate({0.002: 2.1, 0.004: 2.0, 0.008: 3.0}) == 0.001  # worse, but not clearly
    assert mup.next_rate({0.001: 2.9, 0.002: 2.5, 0.004: 2.0}) == 0.008
    assert mup.next_rate({0.001: 2.9, 0.002: 2.0, 0.004: 2.5}) is None
    assert mup.next_rate({0.001: 2.9, 0.002: 2.0, 0.004: None}) is None
    assert mup.next_rate({0.002: None, 0.004: None}) == 0.001


def test_losses_are_means_over_seeds_that_all_are_there() -> None:
    rows = [
        {"curve": "base", "rate": rate, "seed": seed, "val_loss": loss}
        for rate, seed, loss in [(0.002, 1, 3.0), (0.002, 0, 2.0), (0.001, 0, 4.0), (0.004, 0, 1.0), (0.004, 1, None)]
    ]
    rows.append({"curve": "wide, standard", "rate": 0.002, "seed": 0, "val_loss": 9.0})
    assert mup.losses_of(rows, "base", [0, 1], "val_loss") == {0.002: 2.5, 0.004: None}
    assert mup.losses_of(rows, "base", [0], "val_loss") == {0.001: 4.0, 0.002: 2.0, 0.004: 1.0}


def test_exponents_of_seeds() -> None:
    found = mup.exponents([{"exponents": {"forces": value}} for value in (0.1, -0.1, 0.3, 0.1)])["forces"]
    assert found["mean"] == pytest.approx(0.1)
    assert found["spread"] == pytest.approx(np.std([0.1, -0.1, 0.3, 0.1], ddof=1))
    assert found["error"] == pytest.approx(found["spread"] / 2)


def test_labels_in_units_of_the_model() -> None:
    atoms = molecule("CH4")
    atoms.calc = SinglePointCalculator(atoms, energy=-38.0, forces=np.full((5, 3), 3.0))
    potential = Potential(EScAIPConfig.preset("300k", num_layers=1))
    references = torch.zeros(119, dtype=torch.float64)
    references[6], references[1] = -20.0, -5.0
    potential.set_references(references, torch.tensor(2.0, dtype=torch.float64))
    batch = mup.in_units_of_the_model(collate([AtomicData.from_ase(atoms)] * 2), potential)
    assert batch.energy.tolist() == [1.0, 1.0]
    assert batch.forces.unique().tolist() == [1.5]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for runs: the best rate is 0.004, a quarter of it in the wide standard model; keeps what was run."""
    kept: list[Any] = []

    def train(curve: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        kept.append((curve, rate, seed))
        (loss,) = valley(0.001 if curve == "wide, standard" else 0.004, [rate]).values()
        losses = {"val_loss": None if rate > 0.03 else loss, "train_loss": None if rate > 0.03 else 2 * loss}
        return {"curve": curve, "rate": rate, "seed": seed, **losses, "steps": steps, "processor_seconds": 1.0}

    def check(forces: str, base_width: int | None, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        for seed in seeds:
            kept.append((forces, base_width, seed))
            yield {
                "forces": forces, "base_width": base_width, "seed": seed, "processor_seconds": 1.0,
                "changes": {"energy": [1.0, 1.0, 1.0, 1.0]}, "exponents": {"energy": 0.0 if base_width else 1.0},
            }  # fmt: skip

    monkeypatch.setattr(mup, "train", train)
    monkeypatch.setattr(mup, "check", check)
    return kept


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mup.py", *arguments])
    mup.main()


def test_a_second_command_runs_what_is_missing(
    ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mup.json"
    run_main(monkeypatch, "--out", str(out), "--check-seeds", "2")
    content = json.loads(out.read_text(encoding="utf-8"))
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    best = content["best"]
    assert [best[curve]["parabola"] for curve in mup.CURVES] == pytest.approx([0.004, 0.004, 0.001])
    assert best["wide, standard"]["parabola_over_base"] == pytest.approx(0.25)
    assert best["base"]["by_seed"] == pytest.approx([0.004, 0.004])
    for curve in mup.CURVES:
        rates = {row["rate"] for row in content["sweep"] if row["curve"] == curve}
        assert min(rates) < best[curve]["grid"] < max(rates)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "best, by parabola" in capsys.readouterr().out
    assert len(ran) == len(set(ran))

    content["sweep"] = [row for row in content["sweep"] if (row["curve"], row["rate"]) != ("base", 0.008)]
    content["coordinates"].pop()
    out.write_text(json.dumps(content), encoding="utf-8")
    ran.clear()
    run_main(monkeypatch, "--out", str(out), "--check-seeds", "2")
    assert set(ran) == {("base", 0.008, 0), ("base", 0.008, 1), ("direct", None, 1)}


def test_a_row_is_kept_once_it_is_there(ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "mup.json", mup.check

    def cut(*arguments: Any) -> Iterator[dict[str, Any]]:
        yield next(iter(whole(*arguments)))
        raise KeyboardInterrupt

    monkeypatch.setattr(mup, "check", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, "--out", str(out))
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["seed"] for row in content["coordinates"]] == [0]


def test_runs_of_other_settings_are_not_mixed(ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mup.json"
    run_main(monkeypatch, "--out", str(out), "--check-seeds", "1")
    with pytest.raises(ConfigError, match=r"mup\.json holds runs of other settings: give another --out"):
        run_main(monkeypatch, "--out", str(out), "--check-seeds", "1", "--steps", "7")


def test_a_sweep_without_an_optimum_ends(ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def falling(curve: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        return {"curve": curve, "rate": rate, "seed": seed, "val_loss": 1 / rate, "processor_seconds": 0.0}

    monkeypatch.setattr(mup, "train", falling)
    with pytest.raises(TrainingError, match="base: the best of 12 learning rates is not enclosed"):
        mup.sweep(mup.Results(tmp_path / "mup.json", {}), "base", [0], 1)
