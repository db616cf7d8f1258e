"""Inference checkpoints of fairchem-core: read whole, and never run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import COMMITTED, structure

from escaip import load_potential
from escaip.cli import main
from escaip.data import collate
from escaip.errors import CheckpointError
from escaip.interop import read_fairchem
from escaip.interop.fairchem import checkpoint_file as fairchem_file

EXPECTED = json.loads((COMMITTED / "checkpoints.json").read_text(encoding="utf-8"))
ANY = COMMITTED / "checkpoint_conservative.pt"


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_in_physical_units(name: str) -> None:
    """Averaged weights, heads in a wrapper, normalizers and element references, one data set or two."""
    potential = read_fairchem(COMMITTED / f"{name}.pt")
    for answers in EXPECTED[name].values():
        batch = collate([structure(answers["structure"])])
        assert potential.metadata.datasets == tuple(answers["sets"])
        for dataset, expected in answers["sets"].items():
            if potential.datasets:
                potential.choose_dataset(dataset)
            prediction = potential(batch)
            assert prediction.energy.tolist() == pytest.approx(expected["energy"], rel=1e-6)
            forces = np.array(expected["forces"])
            assert np.abs(prediction.forces.detach().numpy() - forces).max() < 1e-5 * np.abs(forces).max()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "imported.escaip"
    assert main(["import", "fairchem", str(ANY), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}: conservative forces, 19 elements, spice\n"
    assert load_potential(out, device="cpu").config == read_fairchem(ANY).config
    assert main(["import", "fairchem", str(ANY), "--out", str(out), "--distance-table", "inference"]) == 0
    assert load_potential(out, device="cpu").config.distance_table == "inference"
    capsys.readouterr()
    assert main(["import", "fairchem", str(tmp_path / "none.pt"), "--out", str(out)]) == 1
    assert "none.pt does not exist" in capsys.readouterr().err
    assert main(["import", "fairchem", str(ANY)]) == 2


def rewritten(tmp_path: Path, pickled: bytes) -> Path:
    """The checkpoint with another pickle in it."""
    path = tmp_path / "changed.pt"
    with zipfile.ZipFile(ANY) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry, pickled if entry.filename.endswith("/data.pkl") else source.read(entry))
    return path


def original() -> bytes:
    with zipfile.ZipFile(ANY) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def refuses(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_fairchem(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Hostile:
    """Pickles as a call."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.parts = (call, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.mark.bad_input
@pytest.mark.parametrize("call", [os.system, eval, exec, getattr, __import__, torch.load, Path])
def test_nothing_in_a_file_is_run(call: Any, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "hostile.pt"
    torch.save({"a": Hostile(call, f"touch {witness}")}, path)
    refuses(path, "holds objects that could run code, and was not read")
    assert not witness.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", list(fairchem_file._STAND_INS))
def test_stand_ins_do_nothing_whatever_they_are_called_with(name: str, tmp_path: Path) -> None:
    """Called, made, given a state or items: an inert record comes out, or the file is refused."""
    module, _, attribute = name.rpartition(".")
    mention = f"c{module}\n{attribute}\n".encode()
    text = b"X\x02\x00\x00\x00id"
    for body in (
        mention + b"(" + text + b"tR.",  # called
        mention + b"(" + text + b"t\x81.",  # made
        mention + b")R}" + text + text + b"sb.",  # given a state
        mention + b")R" + text + b"b.",  # given a state that is none
        mention + b"}" + text + text + b"sb.",  # the class given a state
        mention + b")R" + text + text + b"s.",  # given an item
        mention + b".",  # only mentioned
    ):
        refuses(rewritten(tmp_path, b"\x80\x02" + body), "changed.pt")
    assert read_fairchem(ANY).config.num_layers == 1


@pytest.mark.bad_input
def test_classes_stand_for_nothing_outside_of_the_reading() -> None:
    before = set(torch.serialization.get_safe_globals())
    read_fairchem(ANY)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(ANY, weights_only=True)


@pytest.mark.bad_input
def test_damaged_files(tmp_path: Path) -> None:
    whole = ANY.read_bytes()
    path = tmp_path / "damaged.pt"
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        refuses(path, "damaged")
    pickled = original()
    for length in (1, 100, len(pickled) // 2, len(pickled) - 1):
        refuses(rewritten(tmp_path, pickled[:length]), "changed.pt")
    refuses(rewritten(tmp_path, b""), "damaged")


@pytest.mark.bad_input
def test_files_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {}}, path)
    refuses(path, "is no inference checkpoint of fairchem-core")
    refuses(tmp_path / "none.pt", "does not exist")
    refuses(
        rewritten(tmp_path, original().replace(b"MLIPInferenceCheckpoint", b"MLIPInferenceCheckpoinT")), "could run"
    )
    refuses(rewritten(tmp_path, original().replace(b"model_config", b"modex_config")), "no configuration of a model")
    renamed = original().replace(b"ema_state_dict", b"emx_state_dict").replace(b"model_state_dict", b"modex_state_dict")
    refuses(rewritten(tmp_path, renamed), "holds no weights")


@pytest.mark.bad_input
def test_configurations_that_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="refers to \\$\\{cutoff\\} outside of itself"):
        fairchem_file.plain({"max_radius": "${cutoff}"})
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        fairchem_file.plain(circle)
    with pytest.raises(CheckpointError, match="holds a complex"):
        fairchem_file.plain({"a": 1j})
