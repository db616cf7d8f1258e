"""A model and a head that are registered outside of the package train, save, load, compile and run in ASE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from escaip import EScAIPCalculator, Potential, load_potential
from escaip.data import AtomicData, collate
from escaip.errors import CheckpointError, ConfigError
from escaip.graph import TokenChunks
from escaip.models import MODELS, Model, ModelConfig, build_config, register_model, settings_of
from escaip.nn.heads import HEADS, make_heads, register_head
from escaip.ops import sum_rows
from escaip.testing import check_potential
from escaip.train.module import PotentialModule
from escaip.types import TARGETS, AtomInputs, GraphSettings, ModelOutput, Target, Tokens, register_target


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    hidden_size: int = 16
    cutoff: float = 4.0
    heads: tuple[str, ...] = ()

    @property
    def graph(self) -> GraphSettings:
        return GraphSettings(cutoff=self.cutoff, num_neighbors=None)


class Toy(Model):
    """A sum over pairs: the energy of each atom from an embedding of its neighbors."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.element = nn.Embedding(119, config.hidden_size)
        self.pair = nn.Sequential(nn.Linear(2 * config.hidden_size + 1, config.hidden_size), nn.SiLU())
        self.energy = nn.Linear(config.hidden_size, 1)
        self.heads = make_heads(config.heads, config.hidden_size)

    def forward(self, atoms: AtomInputs, tokens: TokenChunks) -> ModelOutput:
        def features(chunk: Tokens) -> Tensor:
            center, neighbor = (self.element(atoms.atomic_numbers[x]) for x in (chunk.center, chunk.neighbor))
            pair = self.pair(torch.cat([chunk.distance.unsqueeze(1), center, neighbor], dim=1))
            return sum_rows(pair * chunk.log_envelope.exp().unsqueeze(1), chunk.center - chunk.first, chunk.num_atoms)

        node = torch.cat(tokens.map(features))  # (N, H)
        properties = {name: head(node) for name, head in self.heads.items()}
        return ModelOutput(self.energy(node).squeeze(1), properties=properties)


def build_charges(hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, 1), nn.Flatten(0))


def build_dipole(hidden_size: int) -> nn.Module:
    return nn.Linear(hidden_size, 3)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Registers the toy model and two heads for one test."""
    before = dict(MODELS), dict(HEADS), dict(TARGETS)
    register_model("Toy", ToyConfig)(Toy)
    register_target(Target("toy_charges", True, (), "e", "me", 1e3))
    register_target(Target("toy_dipole", False, (3,), "e·Å", "me·Å", 1e3))
    register_head("toy_charges")(build_charges)
    register_head("toy_dipole")(build_dipole)
    yield
    for table, entries in zip((MODELS, HEADS, TARGETS), before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def structures() -> list[ase.Atoms]:
    copper = ase.build.bulk("Cu", cubic=True)
    copper.rattle(0.05, seed=1)
    return [ase.build.molecule("CH3CH2OH"), copper]


def batch_of(atoms: list[ase.Atoms]):  # type: ignore[no-untyped-def]
    return collate([AtomicData.from_ase(x) for x in atoms])


def test_it_trains_saves_loads_and_runs_in_ase(tmp_path: Path) -> None:
    module = PotentialModule(architecture={"name": "Toy", "hidden_size": 8}, repulsion=None)
    assert isinstance(module.potential.model, Toy)
    batch = batch_of(structures())
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        prediction = module.potential(batch)
        loss = prediction.forces.square().mean() + (prediction.energy - torch.tensor([-1.0, 2.0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]

    potential = module.potential.double().eval()
    potential.save(tmp_path / "toy.escaip")
    loaded = load_potential(tmp_path / "toy.escaip", device="cpu")
    assert torch.equal(loaded(batch).energy, potential(batch).energy)
    assert settings_of(loaded.config) == {"name": "Toy", "hidden_size": 8, "cutoff": 4.0}
    atoms = structures()[1]
    atoms.calc = EScAIPCalculator(tmp_path / "toy.escaip", graph_skin=0.3)
    np.testing.assert_allclose(atoms.get_forces(), potential(batch_of([atoms])).forces.detach(), atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_holds_the_contracts_and_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    potential = Potential(ToyConfig(heads=("toy_charges", "toy_dipole"))).double().eval()
    assert all(check.passed for check in check_potential(potential, structures()))
    batch = batch_of(structures())
    expected = potential(batch)
    potential.compile()
    found = potential.train()(batch)  # compiled in the process
    torch.testing.assert_close(found.forces, expected.forces)
    for name in ("toy_charges", "toy_dipole"):
        torch.testing.assert_close(found.properties[name], expected.properties[name])


@pytest.mark.parametrize("settings", [{"name": "Toy"}, {"preset": "300k", "hidden_size": 32, "num_layers": 1,
                                                        "angular_channels": [8]}])  # fmt: skip
def test_further_heads_predict_per_atom_or_per_structure(settings: dict[str, object], tmp_path: Path) -> None:
    config = build_config({**settings, "heads": ["toy_charges", "toy_dipole"]})
    potential, batch = Potential(config).double().eval(), batch_of(structures())
    together = potential(batch)
    assert together.properties["toy_charges"].shape == (len(batch.positions),)
    assert together.properties["toy_dipole"].shape == (2, 3)
    alone = [potential(batch_of([atoms])).properties for atoms in structures()]
    for name, cat in (("toy_charges", torch.cat), ("toy_dipole", torch.cat)):
        torch.testing.assert_close(together.properties[name], cat([x[name] for x in alone]))
    potential.save(tmp_path / "model.escaip")
    loaded = load_potential(tmp_path / "model.escaip", device="cpu")
    assert torch.equal(loaded(batch).properties["toy_dipole"], together.properties["toy_dipole"])
    potential.train()(batch).properties["toy_dipole"].sum().backward()
    assert next(potential.model.heads["toy_dipole"].parameters()).grad.abs().sum() > 0


def test_what_is_not_registered_is_named(tmp_path: Path) -> None:
    path = tmp_path / "toy.escaip"
    Potential(ToyConfig(heads=("toy_dipole",))).save(path)
    del HEADS["toy_dipole"]
    with pytest.raises(CheckpointError, match="head 'toy_dipole' is not registered: import"):
        load_potential(path, device="cpu")
    del MODELS["Toy"]
    with pytest.raises(CheckpointError, match=r"model 'Toy' is not registered .*EScAIP.*: import"):
        load_potential(path, device="cpu")
    with pytest.raises(ConfigError, match="ToyConfig"):
        Potential(ToyConfig())


def test_names_and_configs_belong_to_one_model() -> None:
    with pytest.raises(ConfigError, match="'Toy'"):
        register_model("Toy", ToyConfig)(Model)
    with pytest.raises(ConfigError, match="'Other' clashes with 'Toy'"):
        register_model("Other", ToyConfig)(Toy)
    with pytest.raises(ConfigError, match="'toy_dipole' is registered already"):
        register_head("toy_dipole")(build_charges)
    with pytest.raises(ConfigError, match="'toy_speed' is not registered"):
        ToyConfig.from_dict({"heads": ["toy_speed"]}).heads and Potential(ToyConfig(heads=("toy_speed",)))
    assert register_model("Toy", ToyConfig)(Toy) is Toy


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.escaip"
    Potential(ToyConfig()).save(path)
    with safe_open(path, framework="pt") as stream:
        description = json.loads(stream.metadata()["escaip"])
    assert description["architecture"] == "Toy"
    del description["architecture"]
    save_file(load_file(path), path, metadata={"escaip": json.dumps(description)})
    with pytest.raises(CheckpointError, match="architecture"):
        load_potential(path, device="cpu")
