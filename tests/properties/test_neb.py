"""Nudged elastic bands: a hop whose saddle is known by symmetry, both ways, and ends that do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from escaip.errors import ConfigError, SimulationError
from escaip.properties import minimum_energy_path
from escaip.simulate import relax

Hop = Callable[[], tuple[Atoms, Atoms, Atoms]]


def test_the_barrier_is_that_of_the_bridge(hop: Hop, tmp_path: Path) -> None:
    """Gold on Al(100): by symmetry the bridge, relaxed, is the saddle."""
    initial, final, bridge = hop()
    before = initial.copy(), final.copy()
    expected = relax(bridge, fmax=0.005).energy - relax(initial, fmax=0.005).energy
    calls: list[float] = []
    found = minimum_energy_path(initial, final, images=3, fmax=0.02, report=lambda step, force: calls.append(force))
    assert found.forward == pytest.approx(expected, abs=2e-3)
    assert found.backward == pytest.approx(found.forward, abs=1e-4)
    assert found.saddle == 2
    assert found.climbed
    np.testing.assert_allclose(found.energies, found.energies[::-1], atol=1e-3)
    assert found.largest_force <= 0.02
    assert calls[-1] == found.largest_force
    assert len(calls) >= found.steps
    assert (initial, final) == before
    found.write(tmp_path)
    images = ase.io.read(tmp_path / "neb.extxyz", ":")
    assert [image.get_potential_energy() for image in images] == pytest.approx(found.energies.tolist(), abs=1e-7)
    assert json.loads((tmp_path / "neb.json").read_text())["barrier_forward_eV"] == found.forward
    assert (tmp_path / "neb.png").stat().st_size > 1000


def test_an_even_band_needs_the_climbing_image(hop: Hop) -> None:
    """No image of four is at the middle: the climbing one goes there, the highest of a plain band stays below."""
    initial, final, _ = hop()
    plain = minimum_energy_path(initial, final, images=2, climb=False)
    climbing = minimum_energy_path(initial, final, images=2)
    assert climbing.forward > plain.forward + 0.05
    assert "need not be the saddle" in plain.summary()
    assert "climbing image" in climbing.summary()


def test_the_way_back_is_the_same(hop: Hop) -> None:
    """Ends of different energy: what is up for one is down for the other."""
    initial, final, _ = hop()
    initial.symbols[0] = final.symbols[0] = "Pt"
    there = minimum_energy_path(initial, final, images=3)
    final.calc = EMT()
    back = minimum_energy_path(final, initial, images=3)
    assert there.forward == pytest.approx(back.backward, abs=5e-3)
    assert there.backward == pytest.approx(back.forward, abs=5e-3)
    assert there.reaction_energy == pytest.approx(there.forward - there.backward, abs=1e-12)
    assert abs(there.reaction_energy) > 0.01


@pytest.mark.bad_input
def test_ends_that_do_not_belong_together(hop: Hop) -> None:
    initial, final, _ = hop()
    with pytest.raises(ConfigError, match="same atoms in the same order"):
        minimum_energy_path(initial, final[::-1])
    wider = final.copy()
    wider.set_cell(final.cell * 1.01)
    with pytest.raises(ConfigError, match="the ends have different cells"):
        minimum_energy_path(initial, wider)
    with pytest.raises(SimulationError, match="the ends are one structure"):
        minimum_energy_path(initial, initial)
    with pytest.raises(ConfigError, match=r"set atoms\.calc"):
        minimum_energy_path(initial.copy(), final)
    with pytest.raises(ConfigError, match="cell is constant along a path"):
        minimum_energy_path(initial, final, relaxation="full")
    with pytest.raises(ConfigError, match="images is 0"):
        minimum_energy_path(initial, final, images=0)
    with pytest.raises(ConfigError, match="optimizer is 'newton'"):
        minimum_energy_path(initial, final, optimizer="newton")
    with pytest.raises(SimulationError, match="the band is not converged after 2 steps"):
        minimum_energy_path(initial, final, relaxation="none", steps=2, fmax=0.001)
