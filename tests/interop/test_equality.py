"""Imported models answer as fairchem-core does: committed answers, and a larger set where one was made.

With its code run in float64 they agree to 1e-11; with its float32 to 1e-5, in either precision. Relative to the largest
value of the structure, or to a fifth of the largest of all structures where that is more: forces that symmetry takes to
zero have no relative error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from references import COMMITTED, Reference, case_names, load

from escaip import Potential, load_potential
from escaip.interop import from_fairchem

FLOAT32_BOUND, FLOAT64_BOUND = 1e-5, 1e-11
VARIABLE = "ESCAIP_FAIRCHEM_REFERENCE"


@contextmanager
def built_in(dtype: torch.dtype) -> Iterator[None]:
    """Makes everything in one precision from the start, the centers of the distance basis included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact(reference: Reference) -> Potential:
    """In float64, nothing of it rounded to float32 on the way."""
    with built_in(torch.float64):
        return from_fairchem(reference.weights, reference.config).double()


def errors(potential: Potential, reference: Reference, precision: str, group: str) -> dict[str, float]:
    """Relative error of each quantity."""
    expected = reference.expected(precision, group)
    prediction = potential(reference.batch(group), compute_stress="stress" in expected)
    found = {}
    for quantity, value in expected.items():
        ours = getattr(prediction, quantity).detach().numpy()
        assert ours.shape == value.shape
        scale = max(np.abs(value).max(), 0.2 * reference.largest(quantity))
        found[quantity] = float(np.abs(ours - value).max() / scale)
    return found


def check(reference: Reference) -> None:
    cases = (
        (from_fairchem(reference.weights, reference.config), "float32", FLOAT32_BOUND),
        (from_fairchem(reference.weights, reference.config).double(), "float32", FLOAT32_BOUND),
        (exact(reference), "float64", FLOAT64_BOUND),
    )
    for potential, theirs, bound in cases:
        for group in reference.structures:
            for quantity, error in errors(potential, reference, theirs, group).items():
                place = f"{reference.name}, {group}, {quantity}: {potential.dtype} against {theirs}"
                assert error < bound, f"{place}: {error:.1e}"


@pytest.mark.parametrize("name", case_names(COMMITTED))
def test_committed_answers(name: str) -> None:
    check(load(COMMITTED, name))


def test_all_answers() -> None:
    """Eight models, a dozen kinds of structures."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(f"{VARIABLE} names no folder of answers: benchmarks/fairchem/make_reference.sh makes one")
    for name in case_names(Path(folder)):
        check(load(Path(folder), name))


@pytest.mark.parametrize(
    ("name", "group", "change"),
    [
        ("conservative", "salt", {"boo_weighting": "envelope"}),
        ("conservative", "salt", {"attention_scale": "head"}),
        ("direct", "salt", {"force_weighting": "envelope"}),
        ("truncated", "triclinic", {"rank_truncation": None}),
    ],
)
def test_every_recorded_option_matters(name: str, group: str, change: dict[str, object]) -> None:
    """The defaults of new models are another function: the answers tell them apart."""
    reference = load(COMMITTED, name)
    potential = exact(reference)
    other = Potential(dataclasses.replace(potential.config, **change)).double().eval()
    other.load_state_dict(potential.state_dict())
    assert max(errors(potential, reference, "float64", group).values()) < FLOAT64_BOUND
    assert max(errors(other, reference, "float64", group).values()) > 1e-4


@pytest.mark.parametrize("name", case_names(COMMITTED))
def test_a_saved_import_is_the_same_potential(name: str, tmp_path: Path) -> None:
    reference = load(COMMITTED, name)
    potential = from_fairchem(reference.weights, reference.config)
    potential.save(tmp_path / "imported.escaip")
    again = load_potential(tmp_path / "imported.escaip", device="cpu")
    assert again.config == potential.config
    assert again.metadata == potential.metadata
    batch = reference.batch("molecule")
    assert torch.equal(again(batch).energy.detach(), potential(batch).energy.detach())
