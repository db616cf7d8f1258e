from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from toys import write_store

from escaip import EScAIPConfig, Potential, load_potential
from escaip.calculators import EScAIPCalculator
from escaip.data import AtomicData, AtomicDataModule, Store, collate, fit_statistics
from escaip.data.prepare import prepare
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.info import describe_model

OFFSETS = {"low": {1: -1.0, 6: -7.0}, "high": {1: -13.0, 6: -1000.0, 8: -2000.0}}


def molecules(level: str, count: int, seed: int) -> list[AtomicData]:
    """Molecules whose energies have the zero of a level, and forces four times larger for the high one."""
    rng = np.random.default_rng(seed)
    names = ["CH4", "C2H6", "C2H2"] if level == "low" else ["CH4", "CH3OH", "CO2", "H2O"]
    made = []
    for k in range(count):
        atoms = ase.build.molecule(names[k % len(names)])
        atoms.positions += rng.normal(scale=0.03, size=(len(atoms), 3))
        energy = sum(OFFSETS[level][z] for z in atoms.numbers) + 0.01 * rng.normal()
        forces = rng.normal(scale=1.0 if level == "low" else 4.0, size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        made.append(AtomicData.from_ase(atoms, structure_id=f"{level}:{k}"))
    return made


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Two stores at different levels of theory."""
    for level, count in (("low", 60), ("high", 20)):
        write_store(tmp_path / level, molecules(level, count, seed=count))
    return {level: {"path": str(tmp_path / level)} for level in ("low", "high")}


def module(stores: Any, **options: Any) -> AtomicDataModule:
    made = AtomicDataModule(stores, max_atoms=60, **{"split": {"by": "structure", "val": 0.2}, **options})
    made.setup("fit")
    return made


def test_each_set_has_references_of_its_own(stores: dict) -> None:
    made = module(stores)
    assert list(made.statistics) == ["low", "high"]
    for level, statistics in made.statistics.items():
        for z, energy in statistics.element_references.items():
            assert energy == pytest.approx(OFFSETS[level][z], abs=0.1)
    assert made.statistics["high"].elements == (1, 6, 8)
    seen: dict[int, int] = {0: 0, 1: 0}
    for batch in made.train_dataloader():
        for name, code in zip(batch.structure_id, batch.dataset.tolist(), strict=True):
            assert name.startswith("low" if code == 0 else "high")
            seen[code] += 1
    assert seen == {0: 48, 1: 16}
    assert [len(made.datasets[part]) for part in ("train", "val")] == [64, 16]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"weights": {"low": 1, "high": 1}}, (32, 32)),
        ({"weights": {"low": 1, "high": 3}, "epoch_size": 100}, (25, 75)),
        ({"temperature": 2.0}, (41, 23)),  # 64 · √48 / (√48 + √16) = 40.6
    ],
)
def test_shares_of_an_epoch(stores: dict, sampling: dict, expected: tuple[int, int]) -> None:
    made = module(stores, sampling=sampling)
    assert tuple(made.shares.values()) == expected
    loader = made.train_dataloader()
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        codes = torch.cat([batch.dataset for batch in loader])
        assert (int((codes == 0).sum()), int((codes == 1).sum())) == expected
    assert f"an epoch takes {expected[0]} of low, {expected[1]} of high" in made.summary()


def test_a_replayed_set_has_its_share_of_an_epoch_and_of_validation(stores: dict) -> None:
    """An epoch is one pass over the new data; what is held out is never trained on."""
    made = module({"low": stores["low"]}, replay={"high": stores["high"]}, replay_share=0.25)
    assert made.shares == {"low": 48, "high": 16}
    assert "an epoch takes 48 of low, 16 of high" in made.summary()
    assert list(made.statistics) == ["low", "high"]
    loader, seen = made.train_dataloader(), set[str]()
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        names = [name for batch in loader for name in batch.structure_id]
        new = [name for name in names if name.startswith("low")]
        assert len(new) == len(set(new)) == 48
        assert len(names) == 64
        seen.update(names)
    codes = {
        name: code for batch in loader for name, code in zip(batch.structure_id, batch.dataset.tolist(), strict=True)
    }
    assert all(code == name.startswith("high") for name, code in codes.items())
    held_out = [name for batch in made.val_dataloader() for name in batch.structure_id]
    assert [sum(name.startswith(level) for name in held_out) for level in ("low", "high")] == [12, 2]  # a tenth of 20
    assert len(seen) == 48 + 18
    assert not seen & set(held_out)


def test_what_is_held_out_does_not_depend_on_what_is_read_first(stores: dict) -> None:
    options: dict[str, Any] = {"replay": stores["high"], "replay_share": 0.0242, "split": {"by": "structure"}}
    made = [AtomicDataModule({"low": stores["low"]}, {"low": stores["low"]}, max_atoms=60, **options) for _ in range(2)]
    for stage in ("validate", "fit"):
        made[0].setup(stage)
    made[1].setup("fit")
    assert made[0].state_dict() == made[1].state_dict()
    assert len(made[0].datasets["val"].members["base"]) == 1  # as many as 1.49 for the 60 new ones


@pytest.mark.parametrize("source", ["high", None])
def test_a_replayed_set_gets_labels_of_the_potential(stores: dict, source: str | None) -> None:
    """Their last bits may change from machine to machine, and a run can be resumed all the same."""
    found, hashes = [], set()
    for energy in (-5.0, -5.0 + 1e-9):

        def relabel(structures: Any, name: str, energy: float = energy) -> Any:
            assert name == "base"
            copies = [data.clone() for data in structures]
            for data in copies:
                data.energy.fill_(energy)
            return copies, "abc"

        made = AtomicDataModule(
            {"low": stores["low"]},
            max_atoms=60,
            replay=stores.get(source),
            replay_labels="self",
            split={"by": "structure"},
        )
        made.trainer = SimpleNamespace(lightning_module=SimpleNamespace(init_from="x", relabel=relabel))
        made.setup("fit")
        for part in ("train", "val"):
            found += made.datasets[part].members["base"]
        hashes.add(made.state_dict()["train"])
        assert made.shares == {"low": 54, "base": 23}
    assert all(int(data.dataset) == 1 and abs(float(data.energy) + 5.0) < 1e-8 for data in found)
    assert len(hashes) == 1
    assert len(found) == 2 * (20 if source else 54 + 3)


def test_several_replayed_sets_share_by_size(stores: dict) -> None:
    sets = {"a": {"path": stores["low"]["path"]}, "b": {"path": stores["high"]["path"]}}
    made = module({"new": stores["high"]}, replay=sets, replay_share=0.5)
    assert made.shares == {"new": 16, "a": 12, "b": 4}
    assert {name: len(member) for name, member in made.datasets["val"].members.items()} == {"new": 4, "a": 3, "b": 1}
    with pytest.raises(ConfigError, match="isolated_energies: a: for a mixture"):  # these stay as they are
        module({"new": stores["high"]}, replay=sets, isolated_energies={"a": {"H": -1.0}})


def potential(stores: dict, num_energy_heads: int = 1, **options: Any) -> Potential:
    made = module(stores)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "angular_channels": (8, 4, 2, 1, 1)}
    config = EScAIPConfig.preset("1m", **sizes, cutoff=4.0, num_energy_heads=num_energy_heads)
    result = Potential(config).double().eval()
    result.set_statistics(made.statistics, shares=made.shares, **options)
    return result


def test_energies_follow_the_set_and_forces_do_not(stores: dict, tmp_path: Path) -> None:
    model = potential(stores)
    data = [molecules("low", 1, 3)[0] for _ in range(2)]
    for code, item in enumerate(data):
        item.dataset = torch.tensor([code])
    out = model(collate(data))
    expected = sum(OFFSETS["high"][z] - OFFSETS["low"][z] for z in data[0].atomic_numbers.tolist())
    assert float(out.energy[1] - out.energy[0]) == pytest.approx(expected, abs=0.5)
    # Rows of one matrix product may round differently, by their place.
    torch.testing.assert_close(out.forces[:5], out.forces[5:], rtol=1e-10, atol=1e-12)
    model.save(tmp_path / "mixed.escaip")
    for code, name in enumerate(("low", "high")):
        loaded = load_potential(tmp_path / "mixed.escaip", dataset=name)
        alone = loaded(collate([molecules("low", 1, 3)[0]]))
        assert float(alone.energy) == pytest.approx(float(out.energy[code]), rel=1e-12)
        atoms = molecules("low", 1, 3)[0].to_ase()
        atoms.calc = EScAIPCalculator(tmp_path / "mixed.escaip", dataset=name)
        assert atoms.get_potential_energy() == pytest.approx(float(out.energy[code]), rel=1e-12)


def test_heads_are_chosen_by_the_name_of_their_set(stores: dict, tmp_path: Path) -> None:
    model = potential(stores, num_energy_heads=2)
    data = [molecules("low", 1, 3)[0] for _ in range(2)]
    for code, item in enumerate(data):
        item.dataset = torch.tensor([code])
    forces = model(collate(data)).forces.detach().split(5)
    assert float((forces[0] - forces[1]).abs().max()) > 1e-3
    model.save(tmp_path / "heads.escaip")
    assert describe_model(tmp_path / "heads.escaip")["energy_heads"] == 2
    for name, expected in zip(("low", "high"), forces, strict=True):
        atoms = molecules("low", 1, 3)[0].to_ase()
        (predicted,) = load_potential(tmp_path / "heads.escaip", dataset=name).predict([atoms])
        atoms.calc = EScAIPCalculator(tmp_path / "heads.escaip", dataset=name)
        for found in (predicted.forces, torch.tensor(atoms.get_forces())):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_scale_shared_or_per_set(stores: dict) -> None:
    made = module(stores)
    rms = [statistics.force_rms for statistics in made.statistics.values()]
    each = potential(stores, scale="per_set")
    assert each.scale.tolist() == pytest.approx(rms)
    shared = potential(stores)
    expected = np.sqrt((48 * rms[0] ** 2 + 16 * rms[1] ** 2) / 64)
    assert shared.scale.tolist() == pytest.approx([expected, expected])


@pytest.mark.bad_input
@pytest.mark.parametrize("num_energy_heads", [1, 2])
def test_a_potential_of_several_sets_wants_to_know_which(stores: dict, tmp_path: Path, num_energy_heads: int) -> None:
    model = potential(stores, num_energy_heads)
    with pytest.raises(ConfigError, match=r"references for each of low, high: say whose energies are meant"):
        model(collate(molecules("low", 1, 3)))
    with pytest.raises(ConfigError, match="dataset 'hihg' has no references in this potential, which has low, high"):
        model.choose_dataset("hihg")
    with pytest.raises(ConfigError, match="choose one with dataset=NAME"):
        EScAIPCalculator(model)
    model.choose_dataset("low")
    water = AtomicData.from_ase(ase.build.molecule("H2O"))
    with pytest.raises(UnsupportedElementError, match="the set low had no O"):
        model(collate([water]))
    model.save(tmp_path / "m.escaip")
    with pytest.raises(ConfigError, match="dataset 'x' has no references"):
        load_potential(tmp_path / "m.escaip", dataset="x")


@pytest.mark.bad_input
def test_there_is_a_head_for_each_set(stores: dict) -> None:
    with pytest.raises(ConfigError, match=r"num_energy_heads is 3, .* has 2 sets by name \(low, high\): set .* to 2"):
        potential(stores, num_energy_heads=3)
    single = Potential(EScAIPConfig.preset("1m", num_energy_heads=2))
    with pytest.raises(ConfigError, match=r"has 0 sets by name \(none\): set model.architecture.num_energy_heads to 1"):
        single.set_statistics(module(stores["low"]).statistics)


@pytest.mark.bad_input
def test_levels_of_theory_come_from_structures_that_state_them(tmp_path: Path) -> None:
    for name, levels in (("a", ["PBE"] * 4), ("b", ["PBE", "PBE", "HF", "HF"]), ("c", [])):
        frames = [ase.build.molecule(one) for one in ("H2O", "NH3", "CH4", "CH3OH")]
        for atoms, level in itertools.zip_longest(frames, levels):
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((len(atoms), 3)))
            atoms.info.update({"level_of_theory": level} if level else {})
        ase.io.write(tmp_path / f"{name}.extxyz", frames)
    for name, level in (("a", "PBE"), ("c", "")):
        module = AtomicDataModule(str(tmp_path / f"{name}.extxyz"), max_atoms=60, split={"val": 0})
        module.setup("fit")
        assert module.level_of_theory == level
        prepare(tmp_path / f"{name}.extxyz", tmp_path / name)
        assert Store(tmp_path / name).manifest.get("level_of_theory", "") == level
        prepare(tmp_path / f"{name}.extxyz", tmp_path / f"{name}2", facts={"level_of_theory": "PBE"})
        assert Store(tmp_path / f"{name}2").manifest["level_of_theory"] == "PBE"
    message = "its structures state levels of theory HF and PBE"
    sample = AtomicDataModule("dataset:spice/sample.hdf5", max_atoms=300)
    sample.setup("fit")
    assert sample.level_of_theory == "GFN2-xTB (tblite 0.8.0), not SPICE's"
    with pytest.raises(DataError, match=message):
        AtomicDataModule(str(tmp_path / "b.extxyz"), max_atoms=60, split={"val": 0}).setup("fit")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "b.extxyz", tmp_path / "b")
    with pytest.raises(DataError, match="its structures state the level of theory PBE, its card r2SCAN: name"):
        prepare(tmp_path / "a.extxyz", tmp_path / "d", facts={"level_of_theory": "r2SCAN"})
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "d").exists()


@pytest.mark.bad_input
def test_levels_of_theory_come_from_the_stores_and_are_not_pooled(xyz_file: Path, tmp_path: Path) -> None:
    for name, level in (("a", "PBE"), ("b", "PBE"), ("c", "r2SCAN")):
        prepare(xyz_file, tmp_path / name, facts={"level_of_theory": level})

    def opened(data: Any) -> AtomicDataModule:
        made = AtomicDataModule(data, max_atoms=60, split={"val": 0})
        made.setup("fit")
        return made

    same = opened([str(tmp_path / "a"), str(tmp_path / "b")])
    assert same.level_of_theory == "PBE"
    assert opened({name: {"path": str(tmp_path / name)} for name in "ac"}).level_of_theory == "a: PBE; c: r2SCAN"
    assert opened(str(xyz_file)).level_of_theory == ""
    stated = {"licence": "MIT", "citation": ["A, B 1 (2020)"]}
    prepare(xyz_file, tmp_path / "e", facts=stated)
    card = opened({name: {"path": str(tmp_path / name)} for name in "ae"}).card
    assert {name: card[name] for name in stated} == {"licence": ["MIT"], "citation": ["A, B 1 (2020)"]}
    assert card["data"]["train"].endswith(" structures")
    assert len(same.datasets["train"]) == 120
    whole = fit_statistics([*Store(tmp_path / "a"), *Store(tmp_path / "b")])
    assert same.statistics.element_references == pytest.approx(whole.element_references)
    assert sum(batch.num_graphs for batch in same.train_dataloader()) == 120
    with pytest.raises(DataError, match=r"a \(PBE\), .*c \(r2SCAN\): energies of different levels of theory need"):
        opened([str(tmp_path / "a"), str(tmp_path / "c")])


def test_a_divided_store_needs_no_split(xyz_file: Path, tmp_path: Path) -> None:
    prepare(xyz_file, tmp_path / "s", split={"by": "structure", "val": 0.2, "test": 6})
    made = AtomicDataModule(str(tmp_path / "s"), max_atoms=60)
    made.setup()
    assert {part: len(data) for part, data in made.datasets.items()} == {"train": 42, "val": 12, "test": 6}
    whole = AtomicDataModule({"path": str(tmp_path / "s"), "split": "all"}, max_atoms=60, split={"val": 0})
    whole.setup("fit")
    assert len(whole.datasets["train"]) == 60
    with pytest.raises(ConfigError, match=r"has no split 'extra'; it has train, val, test"):
        AtomicDataModule({"path": str(tmp_path / "s"), "split": "extra"}, max_atoms=60).setup("fit")


@pytest.mark.bad_input
def test_a_flipped_bit_is_found_before_training(stores: dict) -> None:
    (shard,) = Path(stores["low"]["path"]).glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"shard-00000.safetensors: checksum differs"):
        module(stores["low"])
    assert len(module(stores["low"], verify=False).datasets["train"]) == 48


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ("low", {"sampling": {"temperature": 2.0}}, "sampling: needs several sets by name"),
        (None, {"sampling": {"weights": {"low": 1}}}, "sampling: weights name low, but the sets are low, high"),
        (None, {"sampling": {"ratio": 1}}, "sampling: unknown setting 'ratio'"),
        (None, {"sampling": {"weights": {"low": 1, "high": 0}}}, "must be positive; leave a set out"),
        (None, {"sampling": {"temperature": 0}}, "temperature: 0"),
        (None, {"train": {"low": 3}}, r"data\.train: has no path; .* or sets by name"),
        (None, {"val": {"other": "x"}}, r"data.val: names other; the training sets are low, high"),
        (None, {"isolated_energies": {"H": -1.0}}, "isolated_energies: H: for a mixture write them by set"),
        (None, {"scale": "own"}, "scale: 'own'"),
        (None, {"replay_share": 0.3}, r"data\.replay_share: nothing is replayed: give data\.replay"),
        (None, {"replay": "x", "replay_share": 1.0}, r"data\.replay_share: 1\.0 is not between 0 and 1"),
        (None, {"replay": {"high": "x"}}, r"data\.replay: high is a set of data\.train: give"),
        ("low", {"replay": "x"}, r"data\.replay needs a name for the new set: write data\.train: \{NAME"),
        (None, {"replay_labels": "own"}, "replay_labels: 'own'"),
        (None, {"replay_labels": "self"}, "only a PotentialModule in a trainer knows the potential"),
    ],
)
def test_bad_mixtures(stores: dict, sets: str | None, options: dict, message: str) -> None:
    given = stores if sets is None else stores[sets]
    with pytest.raises(ConfigError, match=message):
        module(options.pop("train", given), **options)
