"""A model, a target and its head that are registered outside of the package train, save, compile and are served."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_stand_ins import TINY, labelled_molecules, make_data, make_trainer

from escaip import EScAIPCalculator, Potential, load_potential
from escaip.cli import main
from escaip.data import AtomicData, collate
from escaip.errors import CheckpointError, ConfigError
from escaip.graph import TokenChunks
from escaip.models import MODELS, Model, ModelConfig, build_config, register_model, settings_of
from escaip.nn.heads import HEADS, make_heads, register_head
from escaip.ops import sum_rows
from escaip.potential import PotentialMetadata
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
    register_target(Target(NAME, per_atom=False, shape=(3,), unit="e·Å", reported_unit="me·Å", reported_factor=1e3))
    register_head(NAME)(DipoleHead)
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
    module = PotentialModule(
        architecture={"name": "Toy", "hidden_size": 8}, repulsion=None, core_guard=None, bond_guard=None
    )
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


@pytest.mark.filterwarnings("ignore:.*treespec", "ignore:The .* does not have many workers")
def test_it_is_fine_tuned(tmp_path: Path) -> None:
    """Its children are the parts that can be frozen; a new element starts from the mean of the others."""
    base = Potential(build_config({"name": "Toy"}), metadata=PotentialMetadata(elements=(1, 6, 7)))
    base.save(tmp_path / "toy.escaip")
    module = PotentialModule(init_from=str(tmp_path / "toy.escaip"), freeze=["element", "heads"])
    make_trainer(tmp_path, [], max_epochs=1).fit(module, make_data(tmp_path))
    before, after = base.model.state_dict(), module.potential.model.state_dict()
    assert torch.equal(after["element.weight"][:8], before["element.weight"][:8])
    torch.testing.assert_close(after["element.weight"][8], before["element.weight"][[1, 6, 7]].mean(0))
    assert not torch.equal(after["energy.weight"], before["energy.weight"])


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


NAME = "dipole"


class DipoleHead(nn.Module):
    """Contributions of the atoms to a vector of the structure; not equivariant, which does not matter here."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 3)

    def forward(self, node: Tensor) -> Tensor:
        """Returns ``(N, 3)`` e·Å of ``(N, H)`` features."""
        out: Tensor = self.linear(node)
        return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and data, whose dipole is 0.1 e·Å per hydrogen along each axis."""
    monkeypatch.chdir(tmp_path)
    frames = labelled_molecules(20)
    for atoms in frames:
        atoms.calc.results[NAME] = np.full(3, 0.1 * float((atoms.numbers == 1).sum()))
    ase.io.write("molecules.extxyz", frames)
    recipe = {
        "model": {
            "architecture": {**TINY, "heads": [NAME]}, "learning_rate": 1e-2,
            "losses": {"properties": {NAME: {"weight": 10.0, "kind": "l2"}}},
        },
        "data": {"train": "molecules.extxyz", "split": {"by": "structure", "val": 4}, "batch_size": 4},
        "ema": {"decay": 0.9},
        "evaluation": {"max_structures": 0},
        "trainer": {"max_epochs": 20, "accelerator": "cpu", "log_every_n_steps": 1, "check_val_every_n_epoch": 20},
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def test_from_training_to_molecular_dynamics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "toy.yaml"]) == 0
    assert "dipole MAE (me·Å)" in capsys.readouterr().out
    run = folder / "runs" / "toy" / "latest"
    with (run / "metrics.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    errors = [float(row["train/dipole_mae_me_A"]) for row in rows if row["train/dipole_mae_me_A"]]
    assert np.mean(errors[-8:]) < 0.5 * np.mean(errors[:8])
    (validated,) = (row for row in rows if row["val/dipole_mae_me_A"])
    assert float(validated["val_baseline/dipole_mae_me_A"]) == pytest.approx(300.0, rel=0.3)  # mean label of H2O to CH4
    assert float(validated["val/dipole_mae_me_A"]) < float(validated["val_baseline/dipole_mae_me_A"])

    model = str(run / "best.ckpt")
    potential = load_potential(model, device="cpu")
    potential.save("toy.escaip")
    frames = ase.io.read("molecules.extxyz", ":")
    found = [each.properties[NAME] for each in load_potential("toy.escaip", device="cpu").predict(frames)]
    assert all(torch.equal(x, y.properties[NAME]) for x, y in zip(found, potential.predict(frames), strict=True))

    assert main(["evaluate", "toy.escaip", "molecules.extxyz"]) == 0
    assert "dipole (me·Å)" in capsys.readouterr().out
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))[NAME]
    labels = np.array([atoms.calc.results[NAME] for atoms in frames])
    assert report["errors"]["mae"] == pytest.approx(np.abs(torch.stack(found).numpy() - labels).mean(), rel=1e-5)
    assert report["baselines"]["zero"]["mae"] == pytest.approx(np.abs(labels).mean())
    assert main(["predict", "toy.escaip", "molecules.extxyz", "--out", "predicted.extxyz"]) == 0
    written = ase.io.read("predicted.extxyz", ":")
    np.testing.assert_allclose([atoms.calc.results[NAME] for atoms in written], torch.stack(found), atol=1e-6)

    atoms = frames[0].copy()
    atoms.calc = EScAIPCalculator("toy.escaip", device="cpu")
    np.testing.assert_allclose(atoms.get_dipole_moment(), found[0], atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model.architecture.heads", "[]"], "losses.properties.dipole needs a head that predicts dipole"),
        (["--model.losses.properties", "{}"], "head 'dipole' has no loss"),
        (["--model.losses.properties", "{energy: {weight: 1.0}}"], "write losses.energy"),
        (["--model.losses.properties", "{quadrupole: {weight: 1.0}}"], "quadrupole is no registered target"),
        (["--model.losses.properties.dipole.average", "atom"], "dipole has one value per structure"),
        (["--model.losses.properties.dipole.kind", "l3"], "loss kind 'l3'"),
        (["--data.train", "bare.extxyz"], "no training structure has dipole"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    ase.io.write("bare.extxyz", labelled_molecules(20))
    assert main(["fit", "--config", "toy.yaml", *options]) == 2
    assert text in capsys.readouterr().err
