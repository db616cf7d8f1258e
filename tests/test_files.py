"""Recipes, cards and decks are found, and what is not there is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from escaip import files
from escaip.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the module believe that it lies in the folder returned, installed."""
    package = tmp_path / "site-packages" / "escaip"
    package.mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    return package


def make_card(folder: Path, manifest: str = '[dataset]\ntitle = "Toys"\n') -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.toml").write_text(manifest)
    (folder / "README.md").write_text("# Toys\n")
    (folder / "sample.xyz").write_text("")


def test_every_recipe_is_found_by_name_with_suffix_and_as_a_path() -> None:
    assert "quickstart" in files.list_configs()
    for name in files.list_configs():
        path = files.config_path(name)
        assert path.is_file()
        assert files.config_path(f"{name}.yaml") == path
        assert files.config_path(str(path)) == path


def test_every_card_says_what_its_sample_is() -> None:
    cards = files.list_datasets()
    assert [card.name for card in cards] == sorted(path.parent.name for path in ROOT.glob("datasets/*/manifest.toml"))
    for card in cards:
        assert card.text.startswith("#")
        assert card.manifest["dataset"]["name"] == card.name
        assert {"licence", "level_of_theory", "units", "citation"} <= card.manifest["dataset"].keys()
        sample = card.manifest.get("sample")
        if sample is not None:
            content = files.resolve(f"dataset:{card.name}/{sample['file']}").read_bytes()
            assert len(content) == sample["size"]
            assert hashlib.sha256(content).hexdigest() == sample["sha256"]


def test_the_packaged_copy_comes_first(installed: Path) -> None:
    make_card(installed / "_resources" / "datasets" / "toys")
    make_card(installed.parent / "datasets" / "other")
    assert [card.title for card in files.list_datasets()] == ["Toys"]
    assert files.resolve("dataset:toys/sample.xyz").is_file()


def test_other_paths_stay_as_they_are() -> None:
    assert files.resolve("some/where.xyz") == Path("some/where.xyz")


@pytest.mark.bad_input
def test_a_folder_of_another_project_is_not_taken(installed: Path) -> None:
    make_card(installed.parent / "datasets" / "other")
    with pytest.raises(ConfigError, match="no datasets folder: install escaip again"):
        files.list_datasets()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "sub/quickstart", ""])
def test_unknown_recipe(name: str) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a recipe: recipes are .*quickstart"):
        files.config_path(name)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["nothing", "", "..", "../datasets/spice"])
def test_unknown_card(name: str) -> None:
    with pytest.raises(ConfigError, match=r"has no card: there are .*spice"):
        files.dataset_card(name)


@pytest.mark.bad_input
@pytest.mark.parametrize("file", ["nothing.hdf5", "", "../README.md"])
def test_file_that_the_card_does_not_hold(file: str) -> None:
    with pytest.raises(DataError, match=r"does not exist: the card of spice holds .*sample\.hdf5"):
        files.resolve(f"dataset:spice/{file}")


@pytest.mark.bad_input
def test_damaged_manifest(installed: Path) -> None:
    make_card(installed / "_resources" / "datasets" / "toys", "[dataset\n")
    with pytest.raises(DataError, match=r"manifest\.toml is no valid TOML"):
        files.dataset_card("toys")
