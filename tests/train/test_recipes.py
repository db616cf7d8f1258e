"""Every shipped recipe parses, and builds its model, data module and trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
