"""A small, smooth, history-free pair potential, so that runs are quick and can be compared bit for bit; tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.potential import Potential
from escaip.simulate import MDSettings, MDStatus, run_md

EPSILON, SIGMA, CUTOFF = 0.0104, 3.4, 8.0


class Argon(Calculator):
    """Lennard-Jones times ``(1 − (r/c)²)²``, for cells wider than the cutoff."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, nan_after: int | None = None) -> None:
        super().__init__()
        self.nan_after = nan_after
        self.num_calls = 0

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = (), system_changes: Sequence[str] = ()
    ) -> None:
        super().calculate(atoms, properties, system_changes or all_changes)
        assert self.atoms is not None
        self.num_calls += 1
        place, cell = self.atoms.positions, self.atoms.cell.array
        between = place[None] - place[:, None]
        if self.atoms.pbc.any():
            between = between - np.round(between @ np.linalg.inv(cell)) @ cell
        ranges = [range(-1, 2) if periodic else range(1) for periodic in self.atoms.pbc]
        energy, forces, virial = 0.0, np.zeros_like(place), np.zeros((3, 3))
        for shift in itertools.product(*ranges):
            vector = between + np.array(shift) @ cell
            square = (vector**2).sum(-1)
            if not any(shift):
                np.fill_diagonal(square, np.inf)
            square = np.where(square < CUTOFF**2, square, np.inf)
            inverse = SIGMA**6 / square**3
            window = np.where(np.isfinite(square), 1 - np.where(np.isfinite(square), square, 0.0) / CUTOFF**2, 0.0)
            pair = 4 * EPSILON * (inverse**2 - inverse)
            energy += 0.5 * (pair * window**2).sum()
            # dE/d(r²)
            slope = 4 * EPSILON * (-6 * inverse**2 + 3 * inverse) / square * window**2 - 2 * pair * window / CUTOFF**2
            pull = np.nan_to_num(2 * slope)[..., None] * vector
            forces += pull.sum(axis=1)
            virial += 0.5 * np.einsum("ijx,ijy->xy", vector, pull)
        if self.nan_after is not None and self.num_calls > self.nan_after:
            forces[0, 0] = np.nan
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if self.atoms.pbc.all():
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / self.atoms.get_volume())


@pytest.fixture
def argon() -> Callable[..., Atoms]:
    def make(periodic: bool = True, **options: Any) -> Atoms:
        if periodic:
            atoms = ase.build.bulk("Ar", "fcc", a=5.4, cubic=True).repeat((2, 2, 2))
        else:
            atoms = ase.build.bulk("Ar", "fcc", a=5.4, cubic=True).repeat((2, 1, 1))
            atoms.pbc = False
            atoms.cell = None
        atoms.rattle(0.02, seed=1)
        atoms.calc = Argon(**options)
        return atoms

    return make


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def run_killed() -> Callable[..., None]:
    """Runs molecular dynamics up to the report of a step, at which the process ends."""

    def run(atoms: Atoms, asked: MDSettings, out: Path, step: int, resume: bool = False) -> None:
        def report(status: MDStatus) -> None:
            if status.step == step:
                raise Killed

        with pytest.raises(Killed):
            run_md(atoms, asked, out=out, report=report, resume=resume)

    return run


@pytest.fixture
def make_potential() -> Callable[..., Potential]:
    """Random weights; ``seed`` moves them a little, as training on other data would."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Potential:
        potential: Potential = tiny.make_potential(**overrides)
        potential.scale.fill_(1.0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in potential.parameters() if seed else ():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        potential.element_references.copy_(torch.linspace(-200.0, -2000.0, 119, dtype=torch.float64))
        return potential.to(dtype)

    return make
