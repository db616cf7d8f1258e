"""Model files and references: what goes in comes out, old ones are read, and none can run code."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import batch_of, make_potential

from escaip import EScAIPCalculator
from escaip.data import Statistics
from escaip.errors import CheckpointError, ConfigError, DataError
from escaip.potential import Potential, PotentialMetadata, model_file
from escaip.potential.loading import load_potential
from escaip.potential.model_file import migrate


@pytest.fixture
def potential() -> Potential:
    metadata = PotentialMetadata((1, 8), "GFN2-xTB", ("water",), {"seed": 3})
    made = make_potential(dtype=torch.float32, metadata=metadata)
    made.element_references[1] = -13.6
    return made


def save_lightning(potential: Potential, path: Path, **extra: Any) -> None:
    state = {f"potential.{name}": tensor for name, tensor in potential.state_dict().items()}
    torch.save({"escaip": potential.describe(), "state_dict": state, **extra}, path)


def assert_same(found: Potential, expected: Potential) -> None:
    assert found.config == expected.config
    assert found.metadata == expected.metadata
    for (name, tensor), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert tensor.dtype == other.dtype, name


@pytest.mark.parametrize("double", [False, True])
def test_saved_potential_comes_back_the_same(potential: Potential, tmp_path: Path, double: bool) -> None:
    potential = potential.double() if double else potential
    potential.save(tmp_path / "model.escaip")
    loaded = load_potential(tmp_path / "model.escaip", device="cpu")
    assert_same(loaded, potential)
    assert not loaded.training
    assert list(tmp_path.iterdir()) == [tmp_path / "model.escaip"]


def test_lightning_checkpoint_gives_the_same_potential(potential: Potential, tmp_path: Path) -> None:
    save_lightning(potential, tmp_path / "last.ckpt", global_step=7)
    assert_same(load_potential(tmp_path / "last.ckpt", device="cpu"), potential)


def test_precision_is_changed_on_request_and_references_stay_double(potential: Potential, tmp_path: Path) -> None:
    potential.save(tmp_path / "model.escaip")
    loaded = load_potential(tmp_path / "model.escaip", device="cpu", dtype="float64")
    assert loaded.dtype == torch.float64
    back = loaded.to(torch.float32)
    assert back.dtype == torch.float32
    for values in (back.element_references, back.element_shifts, back.scale):
        assert values.dtype == torch.float64
    assert back.element_references[1] == -13.6


def test_version_1_is_migrated(potential: Potential, tmp_path: Path) -> None:
    """Elements and level of theory at the top, no units of stress."""
    description = {
        "schema": 1,
        "architecture": "EScAIP",
        "config": potential.config.to_dict(),
        "elements": [1, 8],
        "level_of_theory": "GFN2-xTB",
        "units": {"length": "angstrom", "energy": "eV"},
        "cutoff": 4.0,
    }
    save_file(potential.state_dict(), tmp_path / "old.escaip", metadata={"escaip": json.dumps(description)})
    loaded = load_potential(tmp_path / "old.escaip", device="cpu")
    assert loaded.metadata == PotentialMetadata((1, 8), "GFN2-xTB")
    assert loaded.config == potential.config
    assert torch.equal(loaded.element_references, potential.element_references)


def test_version_3_keeps_its_floor(potential: Potential) -> None:
    now = potential.describe()
    description = {**now, "schema": 3, "config": {k: v for k, v in now["config"].items() if k != "boo_floor"}}
    assert migrate(description, "x.escaip")["config"]["boo_floor"] == 1e-6
    assert migrate(now, "x.escaip")["config"]["boo_floor"] == 1e-4


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        (2, "element_shifts"),
        (4, "repulsion.onset"),
        (5, "core_guard.onset"),
        (6, "charge_energies"),
        (7, "bond_guard.onset"),
    ],
)
def test_what_older_versions_did_not_have_is_none(
    potential: Potential, tmp_path: Path, version: int, missing: str
) -> None:
    description = {**potential.describe(), "schema": version}
    assert migrate(description, "x.escaip")["schema"] == model_file.SCHEMA_VERSION
    weights = {name: value for name, value in potential.state_dict().items() if name != missing}
    save_file(weights, tmp_path / "old.escaip", metadata={"escaip": json.dumps(description)})
    loaded = load_potential(tmp_path / "old.escaip", device="cpu")
    assert_same(loaded, potential)
    assert not loaded.repulsion


def test_shifts_add_to_references(potential: Potential, tmp_path: Path) -> None:
    batch = batch_of(molecule("H2O"))
    before = potential(batch, create_graph=False).energy.item()
    potential.element_shifts[1], potential.element_shifts[8] = 2.0, -0.5
    potential.save(tmp_path / "model.escaip")
    loaded = load_potential(tmp_path / "model.escaip", device="cpu", dtype="float64")
    assert loaded.element_shifts.dtype == torch.float64
    assert loaded(batch, create_graph=False).energy.item() == pytest.approx(before + 3.5, abs=1e-4)


def water(*charges: int) -> list[Atoms]:
    return [Atoms(molecule("H2O"), info={"charge": charge}) for charge in charges]


def test_atoms_share_the_energy_of_the_charge() -> None:
    potential = make_potential(charge=True)
    structures = [*water(0, -1, 2, 3), Atoms(molecule("OH"), info={"charge": -1})]
    before = potential.predict(structures)
    potential.charge_energies[19], potential.charge_energies[22] = -6.0, 12.0
    expected = [0.0, -6.0, 12.0, 0.0, -6.0]  # nothing for a charge that training did not show
    for old, new, energy in zip(before, potential.predict(structures), expected, strict=True):
        assert new.energy - old.energy == pytest.approx(energy, abs=1e-9)
        shares = new.atomic_energies - old.atomic_energies
        np.testing.assert_allclose(shares, energy / len(shares), atol=1e-9)
        assert torch.equal(new.forces, old.forces)
    calculator = EScAIPCalculator(potential, "cpu")
    for atoms, found in zip(structures, potential.predict(structures), strict=True):
        assert calculator.get_potential_energy(atoms) == pytest.approx(found.energy, abs=1e-9)


def test_each_set_has_energies_of_charges_of_its_own(tmp_path: Path) -> None:
    potential = make_potential(charge=True)
    potential.set_references(potential.element_references.expand(2, -1), potential.scale)
    potential.set_metadata(PotentialMetadata(datasets=("first", "second")))
    potential.charge_energies[:, 21] = torch.tensor([3.0, 5.0])
    potential.save(tmp_path / "model.escaip")
    energies = [
        load_potential(tmp_path / "model.escaip", dataset=name).predict(water(1))[0].energy
        for name in potential.datasets
    ]
    assert energies[1] - energies[0] == pytest.approx(2.0, abs=1e-9)


@pytest.mark.bad_input
@pytest.mark.bad_input
def test_charges_that_a_model_does_not_know_are_refused() -> None:
    for charge in (1, -21):
        with pytest.raises(DataError, match=rf"total charge of H2O is {charge}, which this model does not know: use"):
            list(make_potential().predict(water(0, charge)))
    for charge in (21, -21):
        batch = batch_of(*water(0, charge))
        batch.structure_id = ["water", "ion"]
        with pytest.raises(DataError, match=rf"total charge outside \[-20, 20\]: ion has {charge}"):
            make_potential(charge=True)(batch)


class Attack:
    """Unpickled naively, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.bad_input
def test_checkpoint_with_code_in_it_is_refused_and_does_not_run(potential: Potential, tmp_path: Path) -> None:
    save_lightning(potential, tmp_path / "evil.ckpt", hook=Attack(tmp_path / "pwned"))
    with pytest.raises(CheckpointError, match="could run code"):
        load_potential(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["escaip", "ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_named(potential: Potential, tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / f"cut.{kind}"
    if kind == "escaip":
        potential.save(path)
    else:
        save_lightning(potential, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"cut\.(escaip|ckpt)") as caught:
        load_potential(path)
    assert "\n" not in str(caught.value)


@pytest.mark.bad_input
def test_files_of_others_are_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another program"):
        load_potential(tmp_path / "other.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="another program"):
        load_potential(tmp_path / "other.ckpt")
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(CheckpointError, match="no model file"):
        load_potential(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_potential(tmp_path / "absent.ckpt")


@pytest.mark.bad_input
def test_future_schema_and_unknown_settings(potential: Potential, tmp_path: Path) -> None:
    description = {**potential.describe(), "schema": 99}
    with pytest.raises(CheckpointError, match="install a newer escaip"):
        migrate(description, "x.escaip")
    with pytest.raises(CheckpointError, match="no valid schema"):
        migrate({"schema": "two"}, "x.escaip")
    description = potential.describe()
    description["config"]["wings"] = 2
    save_file(potential.state_dict(), tmp_path / "odd.escaip", metadata={"escaip": json.dumps(description)})
    with pytest.raises(CheckpointError, match="'wings' does not exist"):
        load_potential(tmp_path / "odd.escaip")


@pytest.mark.bad_input
def test_missing_weights_are_noticed(potential: Potential, tmp_path: Path) -> None:
    state = potential.state_dict()
    state.pop("model.energy_head.mlp.output.weight")
    save_file(state, tmp_path / "part.escaip", metadata={"escaip": json.dumps(potential.describe())})
    with pytest.raises(CheckpointError, match="whole potential"):
        load_potential(tmp_path / "part.escaip")


@pytest.mark.bad_input
def test_full_disk_leaves_the_old_file(potential: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.escaip"
    potential.save(path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        potential.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.bad_input
def test_device_and_dtype_that_do_not_exist(potential: Potential, tmp_path: Path) -> None:
    potential.save(tmp_path / "model.escaip")
    with pytest.raises(ConfigError, match="does not exist"):
        load_potential(tmp_path / "model.escaip", device="toaster")
    with pytest.raises(ConfigError, match="float32 or float64"):
        load_potential(tmp_path / "model.escaip", device="cpu", dtype="float8")


def test_header_is_readable_without_this_package(potential: Potential, tmp_path: Path) -> None:
    potential.save(tmp_path / "model.escaip")
    with safe_open(tmp_path / "model.escaip", framework="np") as stream:
        description = json.loads(stream.metadata()["escaip"])
    assert description["schema"] == model_file.SCHEMA_VERSION
    assert description["units"]["stress"].endswith("positive in tension")


def statistics(force_rms: float, num_structures: int, **changes: Any) -> Statistics:
    values = {"label_counts": {"energy": num_structures, "forces": num_structures}, **changes}
    return Statistics(
        {1: -1.0, 8: -2.0 * force_rms}, force_rms, 0.1, (1, 8), num_structures, 3 * num_structures, **values
    )


SETS = {"first": statistics(1.0, 30), "second": statistics(2.0, 10), "energies": statistics(9.0, 10, label_counts={})}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.75**0.5] * 3),  # by structures
        ({"shares": {"first": 1.0, "second": 3.0, "energies": 4.0}}, [3.25**0.5] * 3),
        ({"scale": "per_set"}, [1.0, 2.0, 1.0]),
    ],
)
def test_the_scale_is_the_force_rms_of_the_mixture(options: dict[str, Any], expected: list[float]) -> None:
    potential = make_potential()
    potential.set_statistics(SETS, **options)
    assert potential.datasets == tuple(SETS)
    assert potential.scale.tolist() == pytest.approx(expected)
    assert potential.element_references[:, 8].tolist() == [-2.0, -4.0, -18.0]
    assert torch.isnan(potential.element_references[:, 6]).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("sets", "scale", "message"),
    [(SETS, "mean", "'mean' is not shared or per_set"), (statistics(0.0, 3), "shared", "all its forces are zero")],
)
def test_what_has_no_scale(sets: Any, scale: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_potential().set_statistics(sets, scale=scale)
