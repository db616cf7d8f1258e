"""Every shipped recipe builds; from the native sample of each data set to a potential, as a user types it."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import yaml

from escaip import load_potential
from escaip.cli import main
from escaip.data import Store
from escaip.files import list_configs, resource_dir
from escaip.models import EScAIPConfig
from escaip.train.cli import build

# Options of the command in each recipe's comment, for data that the user brings.
PATHS = {
    "inp": ["--data.train", "inp.extxyz"],
    "mptrj": ["--data.train", "stores/mptrj"],
    "mptrj_materials": ["--data.train.path", "frames.extxyz", "--data.train.keys.group", "mptrj_traj_id"],
    "mptrj_small": ["--data.train", "stores/mptrj_sample"],
    "oc20": ["--data.train", "stores/oc20"],
    "oc20_conservative": ["--data.train.path", "trajectories/*.traj", "--data.train.group_by", "file"],
    "oc20_direct": ["--data.train.path", "trajectories/*.traj", "--data.train.group_by", "file"],
    "oc20_small": ["--data.train", "stores/oc20_sample"],
    "oc22": ["--data.train", "stores/oc22"],
    "oc22_small": ["--data.train", "stores/oc22_sample"],
    "quickstart": [],
    "solvents": ["--data.train.path", "clusters.xyz", "--data.train.keys.energy", "energy_xtb"],
    "spice": ["--data.train", "stores/spice"],
    "spice_complexes": ["--data.train.path", "complexes.hdf5", "--data.train.format", "spice"],
    "spice_small": ["--data.train", "stores/spice_sample"],
    "threebpa": ["--data.train", "train_300K.xyz"],
}
# Lightning's command line calls jsonargparse by a name that it is about to drop, and so does ours.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def test_every_recipe_is_covered() -> None:
    assert sorted(PATHS) == list_configs()


@pytest.mark.parametrize("name", sorted(PATHS))
def test_recipe_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = build(["fit", "--config", name, *PATHS[name], "--trainer.accelerator", "cpu"])
    text = (resource_dir("configs") / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    assert cli.model.potential.config == EScAIPConfig.from_dict(recipe["model"]["architecture"])
    assert cli.model.learning_rate == recipe["model"]["learning_rate"]
    assert cli.trainer.max_epochs == recipe["trainer"]["max_epochs"]
    assert str(cli.trainer.logger.name) == name
    assert len(text.splitlines()) <= 45
    assert "/work" not in text
    assert "/tmp" not in text
    for line in (line for line in text.splitlines() if "escaip fit" in line):
        assert line.strip("# ").split()[2:4] == ["--config", name]


def test_the_quickstart_finds_its_data() -> None:
    cli = build(["fit", "--config", "quickstart", "--trainer.max_epochs", "1"])
    cli.datamodule.setup("fit")
    assert set(cli.datamodule.datasets) == {"train", "val"}
    assert cli.datamodule.statistics.label_counts["forces"] > 1000
    written = cli.config["fit"].data.train["path"]
    assert str(written).startswith("dataset:spice/")


SOURCES = {
    "oc20": ["dataset:oc20/sample", "--set", "energy=adsorption"],
    "oc22": ["dataset:oc22/sample"],
    "spice": ["dataset:spice/sample.hdf5"],
    "mptrj": ["dataset:mptrj/sample.json", "--set", "energy=uncorrected"],
}
# Of the full recipes only the width and depth are cut: everything else is trained as it is written.
NARROW = [
    *("--model.architecture.hidden_size", "32", "--model.architecture.num_layers", "1"),
    *("--model.architecture.num_heads", "2", "--model.architecture.angular_channels", "[6,3,2,2,3]"),
    *("--model.architecture.num_radial", "32", "--model.architecture.distance_size", "32", "--data.num_workers", "0"),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four samples, prepared."""
    root = tmp_path_factory.mktemp("stores")
    for name, source in SOURCES.items():
        out = str(root / name)
        command = ["data", "prepare", name, *source, "--out", out, "--val", "0.2", "--split-by", "structure"]
        assert main([*command, "--limit", "400"]) == 0
    return {name: root / name for name in SOURCES}


@pytest.mark.parametrize("name", [*SOURCES, *(f"{name}_small" for name in SOURCES)])
def test_two_commands(name: str, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(stores[name.removesuffix("_small")])
    assert store.splits == ["train", "val"]
    narrow = [] if name.endswith("_small") else NARROW
    command = ["fit", "--config", name, "--data.train", str(store.path), "--trainer.accelerator", "cpu", *narrow]
    limits = [
        "--trainer.max_steps",
        "3",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--evaluation.max_structures",
        "0",
    ]
    assert main([*command, *limits, "--data.max_atoms", "150", "--trainer.val_check_interval", "3"]) == 0
    run = tmp_path / "runs" / name / "latest"
    with (run / "metrics.csv").open(encoding="utf-8") as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    potential = load_potential(run / "best.ckpt", device="cpu")
    assert "not" in potential.metadata.level_of_theory  # samples say that their labels are not the set's
    assert potential.metadata.elements == tuple(
        sorted({int(z) for k in store.split_indices("train") for z in store[k].atomic_numbers})
    )
