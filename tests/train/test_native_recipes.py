"""From the native sample of each data set to a trained potential: ``prepare``, then ``fit``, as a user types them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from escaip import load_potential
from escaip.cli import main
from escaip.data import Store

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
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


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
