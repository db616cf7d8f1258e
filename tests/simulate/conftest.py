"""Argon, runs that are killed, and tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import pytest
import tiny
import torch
from ase import Atoms
from pair_potential import Argon

from escaip.potential import Potential
from escaip.simulate import MDSettings, MDStatus, run_md


@pytest.fixture
def argon() -> Callable[..., Atoms]:
    def make(periodic: bool = True, **options: Any) -> Atoms:
        atoms = ase.build.bulk("Ar", "fcc", a=5.4, cubic=True).repeat((2, 2, 2) if periodic else (2, 1, 1))
        if not periodic:
            atoms.pbc, atoms.cell = False, None
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
