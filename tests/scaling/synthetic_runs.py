"""Losses of laws with known parameters, and records of runs that would have had them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from escaip.scaling.study import RECORDS, Record

LAW = {"E": 0.02, "A": 0.03 * 1e6**0.3, "alpha": 0.3, "B": 0.03 * 1e4**0.4, "beta": 0.4, "gamma": 0.12 / 0.7}


def grid(sizes: int = 4, data: int = 3, seeds: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """N and D of every run."""
    n, d = np.meshgrid(np.logspace(5, 7, sizes), np.logspace(3, 5.2, data), indexing="ij")
    return np.repeat(n.ravel(), seeds), np.repeat(d.ravel(), seeds)


def noise(spread: float, number: int, seed: int = 0) -> np.ndarray:
    """Log-normal factors of the losses of runs."""
    factors: np.ndarray = np.exp(spread * np.random.default_rng(seed).standard_normal(number))
    return factors


def loss(n: np.ndarray, d: np.ndarray, spread: float = 0.0, seed: int = 0, **changed: float) -> np.ndarray:
    law = {**LAW, **changed}
    exact = law["E"] + law["A"] * n ** -law["alpha"] + law["B"] * d ** -law["beta"]
    drawn: np.ndarray = exact * noise(spread, len(exact), seed)
    return drawn


def record(**changed: object) -> Record:
    one = Record(
        id="a", size="tiny", seed=0, parameters=1000, parameters_total=1100, structures=50, atoms=450, epochs=2.0,
        steps=100, flops=3e9, learning_rate=1e-3, losses={"forces_mae": 0.1, "loss": 0.3},
        curve=((50, 1.5e9, 0.4), (100, 3e9, 0.3)), seconds=12.5, commit="abc", config={"width": 16},
    )  # fmt: skip
    return replace(one, **changed)  # type: ignore[arg-type]


def records(n: np.ndarray, d: np.ndarray, losses: np.ndarray, variant: str = "default") -> list[Record]:
    """Of runs over one epoch, C = 6 N D × 10 atoms."""
    return [
        record(
            id=f"{variant}-{index}", variant=variant, size=f"{n[index]:.0f}", seed=index, parameters=round(n[index]),
            structures=round(d[index]), flops=60 * float(n[index] * d[index]),
            losses={"forces_mae": float(losses[index])},
        )
        for index in range(len(n))
    ]  # fmt: skip


def write(folder: Path, *groups: list[Record]) -> Path:
    """Returns the file."""
    file = folder / RECORDS
    file.write_text("".join(one.to_json() + "\n" for group in groups for one in group), encoding="utf-8")
    return file


def write_study(folder: Path, *more: list[Record]) -> None:
    """A variant on a grid, one of budgets, and any more."""
    n, d = grid()
    c = np.repeat(np.logspace(11, 13, 3), 10)
    size = 1e5 * (c / 1e12) ** 0.5 * np.tile(np.repeat(np.logspace(-1, 1, 5), 2), 3)
    budgets = records(size, c / 60 / size, loss(size, c / 60 / size, 0.005), "isoflop")
    write(folder, records(n, d, loss(n, d, 0.02)), *more, budgets)
