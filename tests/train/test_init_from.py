"""A training that starts from a potential: the same function before its first step, and what it refuses."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from lightning.pytorch import Callback
from tiny import crystal, make_potential
from training_stand_ins import TINY, labelled_molecules, make_data, make_trainer, write_molecules, write_recipe

from escaip import Potential, load_potential
from escaip.cli import main
from escaip.data import AtomicData, AtomicDataModule, collate, fit_statistics
from escaip.data.dataset import AtomicDataset, MixedDataset
from escaip.errors import ConfigError, DataError
from escaip.files import sha256
from escaip.models import build_config, settings_of
from escaip.potential import PotentialMetadata
from escaip.potential.potential import ENERGY_BUFFERS
from escaip.train import BestAndLast, LossSettings, LossTerm, PotentialModule, WeightEMA
from escaip.train.init_from import freeze, relabel, start_from
from escaip.train.lora import adapted_weights
from escaip.types import MAX_CHARGE

ELEMENTS = (1, 6, 7, 8)
CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "conservative": {},
    "direct": {"forces": "direct"},
    "charge": {"charge": True},
    "linear": {"density_radial": 3, "density_degree": 1, "density_channels": 4},
    "density": {"node_density": 4},
    "table": {"distance_table": "always", "num_radial": 12, "distance_knots": 96},
}


def _file(
    folder: Path,
    elements: tuple[int, ...] = ELEMENTS,
    datasets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Writes a potential with random weights, which float32 rounds, and a repulsion that acts on every bond."""
    potential = make_potential(dtype=dtype, metadata=PotentialMetadata(elements, datasets=datasets), **settings)
    for weight in potential.model.parameters():
        weight.data.mul_(1.0 + 1e-9)
    potential.repulsion.onset = torch.full((119, 119), 1.3)
    potential.element_shifts += 0.25
    potential.save(folder / "base.escaip")
    return folder / "base.escaip"


def _batch(count: int = 6) -> Any:
    return collate([AtomicData.from_ase(atoms) for atoms in labelled_molecules(count, seed=5)])


def _labelled(path: Path, off: torch.Tensor, names: Sequence[str], per_charge: float = 0.0) -> list[AtomicData]:
    """Molecules whose energies are those of a file plus an energy of each element and of each unit of charge."""
    structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(12, names=tuple(names))]
    for index, data in enumerate(structures):
        data.charge[:] = index % 3 if per_charge else 0
    base = load_potential(path, "cpu")
    base.set_metadata(PotentialMetadata())
    for data, predicted in zip(structures, base.predict(structures, compute_forces=False), strict=True):
        data.energy[:] = predicted.energy + float(off[data.atomic_numbers].sum()) + per_charge * int(data.charge)
    return structures


class First(Callback):
    """Copies the potential as it is validated, and trained, before the first step."""

    def __init__(self) -> None:
        self.validated: Any = None
        self.potential: Any = None

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.validated = self.validated or copy.deepcopy(module.potential)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.potential = self.potential or copy.deepcopy(module.potential).eval()


SWITCHED = {"charge": True, "spin": True}
STARTS = {  # what is switched on, rank of low-rank updates, dtype
    "as it is": ({}, 0, torch.float32),
    "charge and spin on": (SWITCHED, 0, torch.float32),
    "low rank": (SWITCHED, 2, torch.float32),
    "float64": ({}, 0, torch.float64),
    "low rank, float64": ({}, 2, torch.float64),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("model", MODELS)
def test_before_the_first_step_it_is_the_file(tmp_path: Path, model: str, start: str) -> None:
    switches, lora, dtype = STARTS[start]
    path = _file(tmp_path, dtype=dtype, **MODELS[model])
    base = load_potential(path, "cpu")
    module = PotentialModule({**settings_of(base.config), **switches}, init_from=str(path), lora=lora)
    first = First()
    options = {"precision": "64-true"} if dtype == torch.float64 else {}
    trainer = make_trainer(tmp_path, [WeightEMA(0.9), first], max_epochs=1, num_sanity_val_steps=1, **options)
    trainer.fit(module, make_data(tmp_path))
    potential, (batch, as_known) = first.potential, (_batch(), _batch())
    for one, structures in ((potential, batch), (base, as_known)):
        structures.charge[:2] = one.config.charge * torch.tensor([1, -2])
    found, expected = potential(batch), base(as_known)
    assert found.forces.dtype == dtype
    assert torch.equal(found.forces, expected.forces)
    assert torch.equal(first.validated(batch).forces, expected.forces)
    offsets = [
        one.atomic_references(structures) + one.atomic_shifts(structures)
        for one, structures in ((potential, batch), (base, as_known))
    ]
    assert float((offsets[0] - offsets[1]).abs().min()) > 0.1  # refitted
    interaction = [one.atomic_energies - offset for one, offset in zip((found, expected), offsets, strict=True)]
    torch.testing.assert_close(*interaction, rtol=0.0, atol=1e-12)
    trained = module.potential.eval()(batch)
    assert not torch.equal(trained.forces, expected.forces)


@pytest.mark.parametrize("charge", [False, True])
def test_energies_of_elements_and_charges_are_found(tmp_path: Path, charge: bool) -> None:
    path = _file(tmp_path, charge=charge)
    off = torch.linspace(-400.0, 300.0, 119, dtype=torch.float64)
    structures = _labelled(path, off, ("H2O", "NH3", "CH4", "CH3OH", "C2H6"), 5.0 * charge)
    potential = Potential(load_potential(path, "cpu").config)
    statistics = fit_statistics(structures)
    line = start_from(potential, str(path), statistics, structures, False, CPU)
    assert "refitted to 12 structures" in line
    if not charge:  # the baseline of validations, without interaction
        assert float(potential.element_references[1]) == pytest.approx(statistics.element_references[1])
    energies = [one.energy for one in potential.eval().predict(structures, compute_forces=False)]
    assert energies == pytest.approx([float(data.energy) for data in structures], abs=1e-5)
    assert potential.charge_energies[[MAX_CHARGE + 1, MAX_CHARGE + 2]].tolist() == pytest.approx(
        [5.0 * charge, 10.0 * charge], abs=1e-4
    )
    origin = potential.metadata.provenance["init_from"]
    assert (origin["file"], origin["elements"]) == (path.name, list(ELEMENTS))


def test_given_energies_stay(tmp_path: Path) -> None:
    path, given = _file(tmp_path, charge=True), dict.fromkeys(ELEMENTS, -3.0)
    structures = _labelled(path, torch.zeros(119), ("H2O", "NH3", "CH4"), 5.0)
    potential = Potential(load_potential(path, "cpu").config)
    line = start_from(potential, str(path), fit_statistics(structures, given), structures, False, CPU)
    assert "as given" in line
    assert potential.element_references[list(ELEMENTS)].tolist() == [-3.0] * 4
    assert not potential.element_shifts.any()
    assert potential.charge_energies.any()


def test_new_elements_start_as_the_mean_of_the_others(tmp_path: Path) -> None:
    """Kept energies stay to the last bit, and that of the new element is fitted to what they leave."""
    path = _file(tmp_path, elements=(1, 6, 7))
    base, off = load_potential(path, "cpu"), torch.zeros(119, dtype=torch.float64)
    start = copy.deepcopy(base)
    start.model.add_elements([8], [1, 6, 7])
    for name, weight in base.model.named_parameters():
        if name.endswith("element.weight"):
            changed = start.model.get_parameter(name)
            torch.testing.assert_close(changed[8], weight[[1, 6, 7]].mean(0))
            assert torch.equal(changed[:8], weight[:8])
    start.save(tmp_path / "start.escaip")
    off[8] = 7.0
    structures = _labelled(tmp_path / "start.escaip", off, ("H2O", "NH3", "CH4"))
    potential = Potential(base.config)
    line = start_from(potential, str(path), fit_statistics(structures), structures, True, CPU)
    assert "kept" in line
    assert "new elements O" in line
    assert potential.metadata.elements == ELEMENTS
    for name in ("element_references", "element_shifts"):
        assert torch.equal(getattr(potential, name)[:8], getattr(base, name)[:8])
    energies = [one.energy for one in potential.eval().predict(structures, compute_forces=False)]
    assert energies == pytest.approx([float(data.energy) for data in structures], abs=1e-5)


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """A potential of the sets a and b, with energies of their own and one scale."""
    base = make_potential(dtype=torch.float32, metadata=PotentialMetadata(ELEMENTS, datasets=("a", "b")))
    references = torch.full((2, 119), torch.nan, dtype=torch.float64)
    references[:, list(ELEMENTS)] = torch.arange(8, dtype=torch.float64).view(2, 4)
    base.set_references(references, torch.tensor([2.0, 2.0], dtype=torch.float64))
    base.save(tmp_path / "base.escaip")
    return tmp_path / "base.escaip"


def _start_sets(path: Path, names: dict[str, tuple[str, ...]], keep: bool) -> Potential:
    found = {name: [AtomicData.from_ase(a) for a in labelled_molecules(6, names=of)] for name, of in names.items()}
    sets = MixedDataset({name: AtomicDataset(structures) for name, structures in found.items()})
    statistics = {name: fit_statistics(structures) for name, structures in found.items()}
    potential = Potential(load_potential(path, "cpu").config)
    start_from(potential, str(path), statistics, sets, keep, CPU)
    return potential


def test_sets_keep_the_energies_of_their_name(two_sets: Path) -> None:
    base, potential = load_potential(two_sets, "cpu"), _start_sets(two_sets, {"b": ("H2O",), "a": ("CH4",)}, keep=True)
    assert potential.datasets == ("b", "a")
    assert not any((potential.repulsion, potential.core_guard, potential.bond_guard))  # the file has none
    for name in ENERGY_BUFFERS:
        assert torch.equal(getattr(potential, name).nan_to_num(), getattr(base, name).flip(0).nan_to_num())


def test_sets_are_refitted_one_by_one(two_sets: Path) -> None:
    potential = _start_sets(two_sets, {"x": ("H2O", "NH3"), "y": ("CH4", "C2H6")}, keep=False)
    assert potential.scale.tolist() == [2.0, 2.0]
    known = [(~row.isnan()).nonzero()[:, 0].tolist() for row in potential.element_references]
    assert known == [[1, 7, 8], [1, 6]]
    with pytest.raises(
        ConfigError, match=r"energies for each of a, b: name the one .* in model\.init_dataset, or name"
    ):
        _start_sets(two_sets, {"x": ("H2O",)}, keep=True)


HEADS = {  # number in the file, sets in training, init_dataset, and the set of the file that each starts from
    "switched on": (1, ("x", "y"), None, (None, None)),
    "by name": (2, ("b", "a"), None, ("b", "a")),
    "one is new": (2, ("b", "x"), "a", ("b", "a")),
    "three": (2, ("x", "b", "y"), "b", ("b", "b", "b")),
    "one for all": (2, ("x",), "b", ("b",)),
}


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("case", HEADS)
def test_each_set_starts_from_a_head_of_the_file(tmp_path: Path, case: str, forces: str) -> None:
    """Forces are those of that head to the last bit, and energies are refitted to labels less its predictions."""
    count, names, chosen, origins = HEADS[case]
    datasets = ("a", "b") if count > 1 else ()
    base = make_potential(
        dtype=torch.float32,
        metadata=PotentialMetadata(ELEMENTS, datasets=datasets),
        num_energy_heads=count,
        forces=forces,
    )
    base.save(tmp_path / "base.escaip")
    base = load_potential(tmp_path / "base.escaip", "cpu")
    found, off = {}, torch.linspace(-9.0, 9.0, 119, dtype=torch.float64)
    for code, (name, origin) in enumerate(zip(names, origins, strict=True)):
        base.choose_dataset(origin)
        found[name] = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(12)]
        for data, predicted in zip(found[name], base.predict(found[name]), strict=True):
            data.energy[:], data.dataset[:] = predicted.energy + float(off[data.atomic_numbers].sum()), code
    sets: Any = MixedDataset({name: AtomicDataset(structures) for name, structures in found.items()})
    statistics = {name: fit_statistics(structures) for name, structures in found.items()}
    settings = {**settings_of(base.config), "num_energy_heads": len(names)}
    potential = Potential(build_config(settings)).eval()
    line = start_from(potential, str(tmp_path / "base.escaip"), statistics, sets, False, CPU, chosen)
    assert f"energy heads {names[0]} from {origins[0] or 'the file'}" in line
    assert potential.datasets == names
    batch = _batch()
    for name, origin in zip(names, origins, strict=True):
        base.choose_dataset(origin)
        potential.choose_dataset(name)
        assert torch.equal(potential(batch).forces, base(batch).forces)
        energies = [one.energy for one in potential.predict([data.to_ase() for data in found[name]])]
        assert energies == pytest.approx([float(data.energy) for data in found[name]], abs=1e-4)


@pytest.mark.parametrize(
    ("data", "options", "status", "text"),
    [
        ("mine: {0}, b: {0}", ["--model.init_dataset", "a"], 0, "heads mine from a, b from b;"),
        ("mine: {0}", ["--model.init_dataset", "a"], 0, "energy heads mine from a;"),
        ("path: {0}", ["--model.init_dataset", "a"], 0, "energy heads from a;"),
        ("path: {0}", [], 2, "has a head for each of a, b: name the one to start from in model.init_dataset"),
        ("path: {0}", ["--model.init_dataset", "c"], 2, "dataset 'c' has no references in this potential"),
        ("a: {0}, b: {0}", ["--model.architecture.num_energy_heads", "1"], 2,
         "another head for each of a, b, and model.architecture.num_energy_heads is 1: set it to 2"),
        ("a: {0}", ["--model.architecture.num_energy_heads", "3"], 2,
         "num_energy_heads is 3, one for each data set, but training has 1 sets by name (a): set"),
    ],
)  # fmt: skip
def test_heads_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], data: str, options: list[str], status: int, text: str
) -> None:
    """Without their number there is one for each set in training."""
    metadata = PotentialMetadata(ELEMENTS, datasets=("a", "b"))
    make_potential(dtype=torch.float32, metadata=metadata, num_energy_heads=2).save("base.escaip")
    sets = f"{{{data.format('molecules.extxyz')}}}"
    command = [*START, "--data.train", sets, *options, "--trainer.max_epochs", "1"]
    assert main(command) == status
    shown = capsys.readouterr()
    assert text in shown.out + shown.err
    if status == 0:
        count = load_potential("runs/tiny/version_0/last.ckpt", "cpu").config.num_energy_heads
        assert count == len(data.split(","))
        assert main([*command[:-1], "2", "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"replay_labels": "self"}, {"replay_labels": "self", "replay": None}],
    ids=["labels of the file", "own labels", "own labels of the new structures"],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_replayed_data_keep_what_the_file_says_of_them(tmp_path: Path, heads: int, options: dict[str, Any]) -> None:
    """Before the first step forces are those of the file for both sets; energies of the replayed one always stay."""
    path = _file(tmp_path, datasets=("base", "x") if heads > 1 else (), num_energy_heads=heads)
    base, first = load_potential(path, "cpu"), First()
    old = write_molecules(tmp_path / "old.extxyz", 30, seed=3)
    new = write_molecules(tmp_path / "new.extxyz", 20)
    data = AtomicDataModule(
        {"mine": str(new)}, batch_size=4, split={"by": "structure", "val": 4}, **{"replay": str(old), **options}
    )
    module = PotentialModule(init_from=str(path), init_dataset="x" if heads > 1 else None)
    make_trainer(tmp_path, [WeightEMA(0.9), first], max_epochs=2).fit(module, data)
    assert data.shares == {"mine": 16, "base": 7}
    assert [len(member) for member in data.datasets["val"].members.values()] == [4, 2]
    start, batch = first.potential, _batch()
    assert start.datasets == module.potential.datasets == ("mine", "base")
    for name, origin in (("mine", "x"), ("base", "base")):
        start.choose_dataset(name)
        base.choose_dataset(origin if heads > 1 else None)
        assert torch.equal(start(batch).forces, base(batch).forces)
    for potential in (start, module.potential):
        for name in ENERGY_BUFFERS:
            assert torch.equal(getattr(potential, name)[1], getattr(base, name))
    assert module.potential.element_shifts[0].any()
    assert all(module.last_errors[name] for name in start.datasets)
    if options:
        for part in ("train", "val"):
            replayed = list(data.datasets[part].members["base"])
            for one, predicted in zip(replayed, base.predict([one.to_ase() for one in replayed]), strict=True):
                assert float(one.energy) == pytest.approx(predicted.energy, abs=1e-5)
                torch.testing.assert_close(one.forces, predicted.forces.double(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("forces", "stress"), [("conservative", True), ("conservative", False), ("direct", True)])
def test_labels_of_a_file(tmp_path: Path, forces: str, stress: bool) -> None:
    """Stress where the file has it and it is wanted; other labels are gone, and the structures stay as they are."""
    path = _file(tmp_path, (11, 17), forces=forces)
    given = AtomicData.from_ase(crystal())
    given.stress.fill_(1.0)
    ((found,), origin) = relabel(str(path), [given], "base", None, stress, CPU)
    assert origin == sha256(path)
    has_stress = stress and forces == "conservative"
    expected = load_potential(path, "cpu").predict([given], compute_stress=has_stress)[0]
    assert float(found.energy) == expected.energy
    assert torch.equal(found.forces, expected.forces.double())
    assert torch.equal(found.stress[0], expected.stress.double()) if has_stress else bool(found.stress.isnan().all())
    assert bool(given.energy.isnan().all())
    assert bool((given.stress == 1.0).all())


@pytest.mark.parametrize("new", [False, True], ids=["known elements", "a new one"])
def test_without_energies_those_of_the_file_stay(tmp_path: Path, new: bool) -> None:
    frames = labelled_molecules(8)
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, forces=atoms.get_forces())
    ase.io.write(tmp_path / "forces.extxyz", frames)
    train, labels = str(tmp_path / "forces.extxyz"), ["forces"]
    data = AtomicDataModule(train=train, batch_size=4, split={"val": 0}, required_labels=labels)
    path = _file(tmp_path, elements=(1, 6, 7) if new else ELEMENTS)
    losses = LossSettings(LossTerm(0.0))

    def fit(**options: Any) -> PotentialModule:
        module = PotentialModule(losses=losses, **options)
        make_trainer(tmp_path, [], max_epochs=1, limit_val_batches=0).fit(module, data)
        return module

    with pytest.raises(DataError, match="no structure has an energy"):
        fit(architecture=TINY)
    if new:
        with pytest.raises(ConfigError, match="no training structure has an energy, and that of O is not known"):
            fit(init_from=str(path))
        return
    base, potential = load_potential(path, "cpu"), fit(init_from=str(path)).potential
    for name in ENERGY_BUFFERS:
        assert torch.equal(getattr(potential, name), getattr(base, name))


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_parts_are_the_whole_model(forces: str) -> None:
    model = make_potential(forces=forces, charge=True, num_layers=2, node_density=4).model
    assert list(model.parts()) == ["embedding", "blocks.0", "blocks.1", "readouts", "heads"]
    found = [p for part in model.parts().values() for module in part for p in module.parameters()]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == len(list(model.parameters()))
    freeze(model, ["heads"])
    frozen = {name.partition(".")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == ({"energy_head"} if forces == "conservative" else {"energy_head", "force_head"})


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_frozen_parts_stay(tmp_path: Path, optimizer: Any) -> None:
    path = _file(tmp_path, num_layers=2)
    module = PotentialModule(
        optimizer=optimizer, weight_decay=0.5, init_from=str(path), freeze=["embedding", "blocks.1", "readouts"]
    )
    callbacks = [WeightEMA(0.5), BestAndLast(dirpath=str(tmp_path))]
    make_trainer(tmp_path, callbacks, max_epochs=2).fit(module, make_data(tmp_path))
    base, trained = (load_potential(tmp_path / name, "cpu") for name in ("base.escaip", "last.ckpt"))
    for part, modules in base.model.parts().items():
        pairs = zip(modules, trained.model.parts()[part], strict=True)
        pairs = [pair for mine, other in pairs for pair in zip(mine.parameters(), other.parameters(), strict=True)]
        same = [torch.equal(*pair) for pair in pairs]
        assert all(same) if part in ("embedding", "blocks.1", "readouts") else not any(same), part


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe, ``tiny.yaml``, and a potential of another architecture."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    _file(tmp_path)
    return tmp_path


START = ["fit", "--config", "tiny.yaml", "--model.init_from", "base.escaip"]


@pytest.mark.parametrize("lora", [0, 2])
def test_fine_tuning_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str], lora: int) -> None:
    options = ["--model.freeze", "[embedding]", "--model.architecture.charge", "true", "--model.lora", str(lora)]
    assert main([*START, *options, "--model.architecture.dropout", "0.1", "--checkpoint.keep_every_n_steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "model.architecture of the configuration does not apply: base.escaip has another" in shown
    assert "start: base.escaip; atomic energies refitted to 12 structures" in shown
    base = load_potential("base.escaip", "cpu")
    same = PotentialModule(settings_of(base.config) | {"charge": True}, init_from="base.escaip", freeze=["embedding"])
    learning = sum(weight.numel() for weight in same.parameters() if weight.requires_grad)
    for weight in adapted_weights(same.potential.model, lora).values() if lora else ():
        learning += lora * sum(weight.shape) - weight.numel()
    assert f", of which {learning:,} learn, on 1 x cpu" in shown
    run = folder / "runs/tiny/version_0"
    whole = load_potential(run / "last.ckpt", "cpu")
    assert settings_of(whole.config) == {**settings_of(base.config), "charge": True, "dropout": 0.1}

    shutil.move("base.escaip", "elsewhere.escaip")  # a run that goes on needs it no more, nor does a validation
    assert main([*START, *options, "--model.architecture.dropout", "0.1", "--ckpt_path", str(run / "step-2.ckpt")]) == 0
    resumed = load_potential("runs/tiny/version_1/last.ckpt", "cpu")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert resumed.metadata == whole.metadata
    assert main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt")]) == 0

    shutil.move("elsewhere.escaip", "base.escaip")  # what was saved configures it again
    capsys.readouterr()
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    assert "does not apply" not in capsys.readouterr().out
    again = load_potential("runs/tiny/latest/last.ckpt", "cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_replay_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with labels of its own resumes bit for bit; both errors are logged; a head is there for each set."""
    write_molecules(folder / "old.extxyz", 30, seed=3)
    metadata = PotentialMetadata(ELEMENTS, datasets=("a", "b"))
    make_potential(dtype=torch.float32, metadata=metadata, num_energy_heads=2).save("base.escaip")
    command = [*START, "--model.init_dataset", "a", "--data.train", "{mine: {path: molecules.extxyz}}"]
    command += ["--data.replay.b.path", "old.extxyz", "--data.replay_share", "0.5", "--data.replay_labels", "self"]
    assert main([*command, "--checkpoint.keep_every_n_steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "an epoch takes 12 of mine, 12 of b" in shown
    assert "energy heads mine from a, b from b; atomic energies refitted to 12 structures for mine; atomic" in shown
    run = folder / "runs/tiny/version_0"
    header = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {f"val/energy_mae_meV_per_atom/{name}" for name in ("mine", "b")} <= set(header)
    assert main([*command, "--checkpoint.keep_every_n_steps", "2", "--ckpt_path", str(run / "step-2.ckpt")]) == 0
    whole, again = (load_potential(f"runs/tiny/version_{k}/last.ckpt", "cpu").state_dict() for k in (0, 1))
    assert all(torch.equal(value.nan_to_num(), again[name].nan_to_num()) for name, value in whole.items())
    assert main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt")]) == 0
    other = [*command, "--data.replay_share", "0.4", "--ckpt_path", "last"]
    capsys.readouterr()
    assert main(other) == 2
    assert "was trained with data.replay_share 0.5, this run has 0.4" in capsys.readouterr().err


REPLAY = ["--data.train", "{mine: {path: molecules.extxyz}}", "--data.replay"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--model.architecture.num_heads", "1"], 2, "num_heads is 1, base.escaip has 2: leave it out"),
        (["--model.architecture.preset", "5m"], 2, "model.architecture.hidden_size is 192, base.escaip has 16"),
        (["--model.architecture.hiden_size", "8"], 2, "did you mean 'hidden_size'"),
        (["--model.freeze", "[blocks.1]"], 2, "no part 'blocks.1': choose among embedding, blocks.0, readouts, heads"),
        (["--model.freeze", "[embedding, blocks, readouts, heads]"], 2, "leave out what should learn"),
        (
            ["--model.freeze", "[embedding, blocks, readouts]", "--model.lora", "2"],
            2,
            "no linear weight outside of the",
        ),
        (["--model.lora", "64"], 2, "model.lora is 64, and factors of no weight have fewer numbers than it: lower it"),
        (["--model.lora", "-1"], 2, "model.lora is -1: it must be a rank"),
        (["--model.init_from", "null", "--model.lora", "2"], 2, "name the potential in model.init_from"),
        (["--model.init_from", "nowhere.escaip"], 1, "model file nowhere.escaip does not exist"),
        (["--model.repulsion", "0.8"], 2, "leave model.repulsion, core_guard and bond_guard out"),
        (["--model.init_energies", "keep", "--data.isolated_energies", "{H: 0, C: 0, N: 0, O: 0}"], 2, "contradicts"),
        (["--model.init_from", "null", "--model.freeze", "[heads]"], 2, "name the potential in model.init_from"),
        (["--model.init_from", "null", "--model.init_dataset", "a"], 2, "name the potential in model.init_from"),
        ([*REPLAY, "molecules.extxyz", "--model.init_from", "null"], 2, "name the potential in model.init_from"),
        ([*REPLAY, "nowhere.extxyz"], 1, "data.replay: nowhere.extxyz: no such file"),
        ([*REPLAY, "bare.extxyz"], 1, "bare.extxyz"),
        ([*REPLAY, "null", "--data.replay_labels", "self", "--model.init_from", "other.escaip"], 1, "not trained on O"),
    ],
)
def test_what_users_get_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, text: str
) -> None:
    ase.io.write("bare.extxyz", labelled_molecules(3)[0].copy())
    _file(folder / "..", elements=(1, 6, 7)).rename("other.escaip")
    assert main([*START, *options]) == status
    assert text in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.bad_input
def test_runs_that_cannot_be_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = folder / "runs/tiny/version_0/last.ckpt"

    def refused(*options: str) -> str:
        assert main([*options, "--trainer.max_epochs", "2", "--ckpt_path", str(last)]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert main([*START, "--model.freeze", "[embedding]", "--trainer.max_epochs", "1"]) == 0
    assert "trained with model.init_from base.escaip, this run has null" in refused("fit", "--config", "tiny.yaml")
    assert 'trained with model.freeze ["embedding"], this run has []' in refused(*START)
    old = torch.load(last, weights_only=True)
    del old["hyper_parameters"]["lora"]  # a checkpoint from before there was a choice
    torch.save(old, last)
    low_rank = [*START, "--model.freeze", "[embedding]", "--model.lora", "2"]
    assert "trained with model.lora 0, this run has 2" in refused(*low_rank)
    switched = [*START, "--model.freeze", "[embedding]", "--model.architecture.charge", "true"]
    assert f"model.architecture.charge is True, {last} has False" in refused(*switched)


@pytest.mark.bad_input
def test_a_linear_energy_takes_no_new_elements(tmp_path: Path) -> None:
    path = _file(tmp_path, elements=(1, 6, 7), **MODELS["linear"])
    with pytest.raises(ConfigError, match=r"linear energy .* takes no new elements, and the training set has O"):
        make_trainer(tmp_path, []).fit(PotentialModule(init_from=str(path)), make_data(tmp_path))


@pytest.mark.bad_input
def test_an_architecture_that_is_not_that_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture\.\w+ is .*: leave it out"):
        make_trainer(tmp_path, []).fit(PotentialModule(TINY, init_from=str(_file(tmp_path))), make_data(tmp_path))
