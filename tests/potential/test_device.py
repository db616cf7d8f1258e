"""A GPU gives the results of the CPU, without mixing devices and with few synchronisations.

Without a GPU a simulated one takes its place (shadow.py lists its limits).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from lightning.pytorch.plugins import Precision
from shadow import CUDA, counted_waits, shadow_device
from tiny import SMALL, batch_of, crystal
from torch import Tensor

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.calculators import CommitteeCalculator
from escaip.graph import build_graph, neighbor_list
from escaip.ops.triton import availability
from escaip.train import ForceTerm, LossSettings, LossTerm, PotentialModule, WeightEMA
from escaip.train.atomic_energy_refit import ReferenceFit
from escaip.train.losses import loss_sums
from escaip.train.metrics import error_sums

REAL = torch.cuda.is_available()
make_potential = partial(tiny.make_potential, dtype=torch.float32, num_layers=2, distance_knots=16)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with contextlib.nullcontext() if REAL else shadow_device():
        yield


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts synchronisations of host and device within."""
    if not REAL:
        with counted_waits() as found:
            yield found
        return
    found = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.update(f"{x.filename}:{x.lineno}" for x in caught if "synchroniz" in str(x.message))


def on_device(potential: Potential) -> Potential:
    return copy.deepcopy(potential).to(CUDA)


def make_batch() -> Any:
    """A crystal and a molecule, with labels for the first."""
    labelled, generator = crystal(), np.random.default_rng(0)
    energy, forces, stress = -3.0, generator.normal(size=(8, 3)), generator.normal(size=6)
    labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces, stress=stress)
    return batch_of(labelled, ase.build.molecule("H2O"))


def tolerance_of(potential: Potential) -> float:
    return 3e-4 if potential.dtype == torch.float32 else 1e-10


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    """Compares two dataclasses, the first on the device and the second on the CPU."""
    for (name, x), y in zip(vars(found).items(), vars(expected).values(), strict=True):
        if isinstance(y, Tensor):
            assert x.device.type == "cuda", name
            torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert x == y, name


GRAPHS: dict[str, dict[str, Any]] = {
    "soft": {}, "radius": {"num_neighbors": None}, "hard": {"soft": False}, "truncated": {"rank_truncation": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "searched", "slack"),
    [(name, searched, 0.0) for name in GRAPHS for searched in (True, False)] + [("soft", True, 0.2)],
)
def test_graphs(name: str, searched: bool, slack: float) -> None:
    settings = dataclasses.replace(EScAIPConfig.from_dict(SMALL).graph, **GRAPHS[name])
    batch = make_batch()
    there = batch.clone().to(CUDA)
    found, expected = (
        build_graph(each, settings, None if searched else neighbor_list(each, 8.0), slack) for each in (there, batch)
    )
    assert_same(found, expected, 1e-12)


# Float32 goes to the Triton kernels, float64 to plain operations.
MODELS: dict[str, dict[str, Any]] = {
    "float32": {}, "float64": {"dtype": torch.float64}, "table": {"distance_table": "always"},
    "conditioned": {"charge": True, "spin": True, "message_gate": True, "distance_table": "never"},
    "radius": {"num_neighbors": None, "aggregation": "graph_attention", "norm": "layernorm"},
    "published": {"boo_weighting": "uniform", "rank_truncation": 4, "angular_channels": None},
    "direct": {"forces": "direct"}, "densities": {"angular_values": True, "node_density": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_predictions_with_a_graph_do_not_wait(name: str) -> None:
    potential, batch = make_potential(**MODELS[name]), make_batch()
    potential.repulsion.onset = torch.full((119, 119), 2.5)
    there, moved = on_device(potential), batch.clone().to(CUDA)
    wanted = {"compute_stress": True, "compute_virials": True} if potential.config.is_conservative else {}
    graph = there.graph_of(moved)
    there(moved, graph=graph, **wanted)  # kernels are compiled, and tables made
    with waits() as found:
        prediction = there(moved, graph=graph, **wanted)
    if potential.dtype == torch.float32 and availability() is None:  # the plain operations read sizes
        assert not found
    assert_same(prediction, potential(batch, **wanted), tolerance_of(potential))


def test_sets_of_references() -> None:
    potential, batch = make_potential(num_layers=1), make_batch()
    references = torch.linspace(-1.0, 1.0, 238, dtype=torch.float64).view(2, 119)
    potential.set_references(references, torch.tensor([2.0, 3.0], dtype=torch.float64))
    potential.set_metadata(dataclasses.replace(potential.metadata, datasets=("first", "second")))
    potential.choose_dataset("second")
    there = on_device(potential)
    assert_same(there(batch.clone().to(CUDA)), potential(batch), tolerance_of(potential))


@pytest.mark.parametrize("name", ["float64", "table", "direct", "recomputed"])
def test_a_step_of_training(name: str) -> None:
    potential, batch = make_potential(**{"num_layers": 1, **MODELS.get(name, {})}).train(), make_batch()
    conservative = potential.config.is_conservative
    losses = LossSettings(LossTerm(1.0), ForceTerm(10.0), LossTerm(1.0 if conservative else 0.0))
    potential.recompute = name == "recomputed" or None
    there, moved = on_device(potential), batch.clone().to(CUDA)

    def train(potential: Potential, batch: Any) -> list[Tensor]:
        optimizer = torch.optim.AdamW(potential.parameters(), 1e-3)
        prediction = potential(batch, compute_stress=conservative, create_graph=True)
        loss_sums(prediction, batch, losses).total(losses).backward()
        torch.nn.utils.clip_grad_norm_(potential.parameters(), 1.0)
        optimizer.step()
        fit = ReferenceFit((1, 8, 11, 17), (True,), LossTerm(1.0, kind="huber"))
        fit.add(fit.of_batch(prediction, batch))
        gradients = [weight.grad for weight in potential.parameters() if weight.grad is not None]
        return [error_sums(prediction, batch), fit.solve(), *gradients, *potential.parameters()]

    tolerance = 1e-3 if potential.dtype == torch.float32 else 1e-9
    for x, y in zip(train(there, moved), train(potential, batch), strict=True):
        assert x.device.type == "cuda"
        torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["autograd", "finite_differences"])
def test_second_derivatives(method: str) -> None:
    potential, molecule = make_potential(dtype=torch.float64, num_layers=1), ase.build.molecule("H2O")
    found = on_device(potential).hessian(molecule, method=method)
    torch.testing.assert_close(found, potential.hessian(molecule, method=method), rtol=1e-7, atol=1e-7)


def test_predictions_of_many() -> None:
    potential, many = make_potential(num_layers=1), [crystal(), ase.build.molecule("H2O"), ase.build.molecule("CH4")]
    found = on_device(potential).predict(many, compute_stress=True)
    for x, y in zip(found, potential.predict(many, compute_stress=True), strict=True):
        for name in ("energy", "forces", "stress", "atomic_energies"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("graph_skin", "cut_from"), [(0.0, 0), (0.3, 10_000), (0.3, 0)])
def test_a_calculator_waits_once_for_its_results(
    graph_skin: float, cut_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kept graph; once more where it is cut to what counts."""
    monkeypatch.setattr("escaip.calculators.ase._TIGHT_FROM", (0, cut_from))
    potential, atoms = make_potential(num_layers=1), crystal()
    there = EScAIPCalculator(potential, device="cuda", graph_skin=graph_skin)
    here, counts = EScAIPCalculator(potential, device="cpu", graph_skin=graph_skin), []
    for step in range(3):
        atoms.positions[0] += 0.01
        if step == 2:
            atoms.set_cell(atoms.cell * 1.001, scale_atoms=True)
        with waits() as found:
            atoms.calc = there
            results = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        counts.append(sum(found.values()))
        atoms.calc = here
        np.testing.assert_allclose(results[0], atoms.get_potential_energy(), atol=1e-4)
        np.testing.assert_allclose(results[1], atoms.get_forces(), atol=1e-4)
        np.testing.assert_allclose(results[2], atoms.get_stress(), atol=1e-5)
    if graph_skin:
        assert counts[1:] == (2 * [1] if cut_from else 2 * [2])


def test_a_committee() -> None:
    members, atoms = [make_potential(num_layers=1), make_potential(num_layers=1, distance_table="always")], crystal()
    there = CommitteeCalculator(members, device="cuda", graph_skin=0.3)
    here = CommitteeCalculator(members, device="cpu", graph_skin=0.3)
    for _ in range(2):
        atoms.positions[0] += 0.01
        for name in ("stresses", "energy", "forces", "stress", "forces_spread"):
            found, expected = there.get_property(name, atoms), here.get_property(name, atoms)
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert there.num_graph_builds == 1


def test_averaged_weights_go_where_the_module_goes() -> None:
    """Lightning makes them before it moves the module, and would copy every weight to the host at every step."""
    module, average = PotentialModule(SMALL), WeightEMA(0.9)
    trainer: Any = SimpleNamespace(precision_plugin=Precision())
    average.setup(trainer, module, "fit")
    module.to(CUDA)
    average.on_fit_start(trainer, module)
    assert average._average_model is not None
    tensors = [*average._average_model.module.parameters(), *average._average_model.module.buffers()]
    assert {x.device.type for x in tensors} == {"cuda"}
    for _ in range(2):
        average._average_model.update_parameters(module)
    for x, y in zip(average._average_model.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(x.detach().cpu(), y.detach().cpu())
