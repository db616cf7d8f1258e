"""Low-rank updates: the numbers of adapters in the forward, and models that are plain at every moment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch_of, make_potential
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from training_stand_ins import labelled_molecules, make_data, make_trainer

from escaip import load_potential
from escaip.models import settings_of
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.compile import CompiledEvaluator
from escaip.train import BestAndLast, PotentialModule
from escaip.train.lora import ALPHA, LowRankUpdate

MODELS: dict[str, dict[str, Any]] = {
    "conservative": {"num_layers": 2},
    "direct": {"forces": "direct"},
    "density": {"node_density": 4, "message_gate": True},
    "table": {"distance_table": "always", "num_radial": 12, "distance_knots": 96},
    "compiled": {},
}
RANK = 2


class Adapter(nn.Module):
    """The update of a weight inside the forward."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.up @ self.down


def _with_adapters(potential: Potential, down: dict[str, Tensor], up: dict[str, Tensor]) -> dict[str, Adapter]:
    adapters = {name: Adapter(down[name], up[name]) for name in down}
    for name, adapter in adapters.items():
        register_parametrization(potential.model.get_submodule(name), "weight", adapter)
    return adapters


@pytest.mark.parametrize("model", MODELS)
def test_factors_get_the_gradients_of_adapters_in_the_forward(model: str) -> None:
    plain, batch = make_potential(**MODELS[model]).train(), batch_of()
    other = copy.deepcopy(plain)
    if model == "compiled":
        plain.evaluator = CompiledEvaluator(backend="eager")
    update = LowRankUpdate(plain.model, RANK, seed=0)
    for up in update.up.values():
        assert not up.any()
        up.normal_(0.0, 0.02)
    update.apply()
    adapters = _with_adapters(other, update.down, update.up)
    predictions = [potential(batch) for potential in (plain, other)]
    for name in ("energy", "forces"):
        torch.testing.assert_close(*[getattr(one, name) for one in predictions], rtol=1e-10, atol=1e-10)
    for prediction in predictions:
        (prediction.energy.square().sum() + prediction.forces.square().sum()).backward()
    update.take_gradients()
    for name, adapter in adapters.items():
        for found, expected in ((update.down[name], adapter.down), (update.up[name], adapter.up)):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-8)
        assert update.weights[name].grad is None


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_a_saved_model_is_the_file_plus_the_factors(tmp_path: Path, optimizer: Any) -> None:
    """Frozen parts stay, heads and all that is no linear weight learn, and the file is that of any model."""
    path = tmp_path / "base.escaip"
    potential = make_potential(metadata=PotentialMetadata((1, 6, 7, 8)), num_layers=2)
    for weight in potential.model.parameters():
        weight.data.mul_(1.0 + 1e-9)  # float32 would round it
    potential.save(path)
    before = load_potential(path, "cpu")
    module = PotentialModule(
        settings_of(before.config), optimizer=optimizer, weight_decay=0.1, init_from=str(path), lora=RANK,
        freeze=["embedding", "blocks.1"],
    )  # fmt: skip
    callbacks = [BestAndLast(dirpath=str(tmp_path))]
    make_trainer(tmp_path, callbacks, max_epochs=2, precision="64-true").fit(module, make_data(tmp_path))
    after = load_potential(tmp_path / "last.ckpt", "cpu")
    factors = torch.load(tmp_path / "last.ckpt", weights_only=True)["lora"]
    assert before.state_dict().keys() == after.state_dict().keys()
    of_heads = {id(module) for head in after.model.parts()["heads"] for module in head.modules()}
    adapted = set()
    for name, module in after.model.named_modules():
        if isinstance(module, nn.Linear):
            old, new = before.model.get_parameter(f"{name}.weight"), module.weight
            if name.startswith(("blocks.0", "node_")) and RANK * sum(new.shape) < new.numel():
                adapted.add(name)
                assert torch.equal(factors["base"][name], old)
                assert torch.linalg.matrix_rank(new - old, atol=1e-12) == RANK
            else:
                frozen = not name.startswith(("blocks.0", "node_")) and id(module) not in of_heads
                assert torch.equal(old, new) == frozen, name
    assert adapted == factors["up"].keys()
    assert "blocks.0.message.mix" in adapted  # of parts side by side
    moved = ("blocks.0.norm_node.weight", "blocks.0.attributes.source.element.weight", "node_projection.linear.bias")
    assert not any(torch.equal(before.model.get_parameter(n), after.model.get_parameter(n)) for n in moved)

    _with_adapters(before, factors["down"], factors["up"])
    for name in {name for name, _ in after.model.named_parameters()} - {f"{name}.weight" for name in adapted}:
        before.model.get_parameter(name).data.copy_(after.model.get_parameter(name).data)
    batch = batch_of(*labelled_molecules(4))
    torch.testing.assert_close(before(batch).forces, after(batch).forces, rtol=1e-10, atol=1e-10)
