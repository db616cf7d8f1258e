"""Padded evaluations: added rows on which no result depends, and sizes that rarely change."""

from __future__ import annotations

import dataclasses

import ase.build
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TABLE, batch_of
from torch import Tensor

from escaip import Potential
from escaip.graph import build_graph, displacements
from escaip.nn.embedding import kept_tables
from escaip.potential.compile import flat_evaluation
from escaip.potential.derivatives import EvaluationInputs
from escaip.potential.padding import Sizes, pad, unpad
from escaip.types import AtomInputs


def make_potential(**overrides: object) -> Potential:
    return tiny.make_potential(num_layers=2, **TABLE, **overrides).requires_grad_(False)


def inputs_of(potential: Potential, *structures: ase.Atoms) -> EvaluationInputs:
    batch = batch_of(*structures)
    graph = build_graph(batch, potential.config.graph)
    vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
    return EvaluationInputs(
        vectors, torch.ones(len(batch.positions), dtype=torch.float64), AtomInputs.of_batch(batch), graph
    )


def crystal(seed: int, atoms: int = 8) -> ase.Atoms:
    made = ase.build.bulk("Cu", cubic=True).repeat((atoms // 4, 1, 1))
    made.rattle(0.1, seed=seed)
    return made


def structures() -> list[list[ase.Atoms]]:
    ethanol = ase.build.molecule("CH3CH2OH")
    return [[ase.Atoms("Cu")], [ase.build.molecule("H2O")], [crystal(0), ethanol], [ethanol]]


def run(potential: Potential, tensors: list[Tensor]) -> list[Tensor]:
    model = potential.model
    return flat_evaluation(model, kept_tables(model), tensors, potential.config.is_conservative, False)


@pytest.mark.parametrize("options", [{}, {"forces": "direct"}, {"num_neighbors": None}, {"charge": True}],
                         ids=["default", "direct", "radius", "charge"])  # fmt: skip
@pytest.mark.parametrize("more", [(1, 1, 0, 0), (3, 17, 5, 40), (2, 2, 1, 0), (0, 0, 4, 9), (5, 100, 0, 1)])
def test_added_rows_change_nothing(options: dict[str, object], more: tuple[int, int, int, int]) -> None:
    potential = make_potential(**options)
    for batch in structures():
        inputs = inputs_of(potential, *batch)
        own = Sizes.of(inputs)
        sizes = Sizes(*(mine + added for mine, added in zip(dataclasses.astuple(own), more, strict=True)))
        padded = pad(inputs, sizes)
        assert Sizes.of(padded) == sizes
        tokens = torch.arange(sizes.tokens)
        reverse = padded.layout.reverse
        assert torch.equal(reverse[reverse], tokens)
        assert torch.equal(padded.layout.offsets[:-1], padded.layout.self_token)
        assert padded.layout.offsets[-1] == sizes.tokens
        centers = torch.repeat_interleave(torch.arange(sizes.atoms), padded.layout.offsets.diff())
        assert torch.equal(centers, padded.layout.token_center)

        (right, right_gradient) = unpad(run(potential, inputs.flat()), own, own, potential.config)
        (found, gradient) = unpad(run(potential, padded.flat()), sizes, own, potential.config)
        for x, y in ((found.energy, right.energy), (found.forces, right.forces), (gradient, right_gradient)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 3000), st.integers(0, 60_000), st.integers(0, 50_000), st.integers(0, 10**6))
def test_a_capacity_holds_its_sizes_and_is_not_much_larger(atoms: int, tokens: int, extra: int, pairs: int) -> None:
    own = Sizes(atoms, atoms + tokens, extra, pairs)
    capacity = own.capacity()
    assert capacity.hold(own)
    assert capacity.hold(capacity)
    assert capacity.tokens <= 1.12 * own.tokens + 8
    assert not own.hold(capacity)
