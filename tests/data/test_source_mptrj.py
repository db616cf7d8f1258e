from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.data
import ase.io
import ase.units
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Structure
from toys import assert_bad, assert_parts, refusal

from escaip.data import AtomicData
from escaip.data.readers import mptrj
from escaip.data.readers.mptrj import divide, matches, read_mptrj
from escaip.data.readers.policy import ReadPolicy
from escaip.errors import ConfigError, DataError
from escaip.files import dataset_card
from escaip.types import TARGETS, Target
from escaip.units import KBAR, Units

REAL = "native_formats/mptrj_json_derived/MPtrj_sample_150.json"
LABELS = ("energy", "forces", "stress")


def sample() -> Path:
    return dataset_card("mptrj").path / "sample.json"


def read(path: Path, policy: ReadPolicy | None = None, **options: Any) -> list[AtomicData]:
    return list(read_mptrj(path, path.name, policy or ReadPolicy(), **{"energy": "uncorrected", **options}))


def frame(**changes: Any) -> dict[str, Any]:
    """A frame of two atoms; ``changes`` replace or (None) empty entries."""
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": [x, x, x], "label": symbol, "properties": {}}
        for symbol, x in (("Na", 0.0), ("Cl", 0.5))
    ]
    return {
        "structure": {"lattice": {"matrix": np.diag([4.0, 4.0, 4.0]).tolist()}, "sites": sites, "charge": None},
        "uncorrected_total_energy": -7.0,
        "corrected_total_energy": -7.5,
        "force": [[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]],
        "stress": [[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]],
        "magmom": None,
        **changes,
    }


def written(path: Path, content: Any, **style: Any) -> Path:
    path.write_text(json.dumps(content, **style))
    return path


def test_real_frames_equal_pymatgen_and_their_origin(shared_data: Callable[[str], Path]) -> None:
    """The structures are pymatgen's to the last digit; the labels are those of the extxyz that the JSON was made of."""
    path = shared_data(REAL)
    origin = {
        atoms.info["mptrj_snapshot_id"]: atoms
        for name in ("random", "highest_stress")
        for atoms in ase.io.iread(shared_data(f"materials/mptrj_{name}.extxyz"), ":")
    }
    found = {data.structure_id: data for data in read(path, ReadPolicy(required=LABELS))}
    content = json.loads(path.read_text())
    assert len(found) == sum(map(len, content.values())) == 150
    for material, frames in content.items():
        for key, record in frames.items():
            data, atoms = found[f"{path.name}:{material}:{key}"], origin[key]
            structure = Structure.from_dict(record["structure"])
            assert data.group == material
            assert data.atomic_numbers.tolist() == list(structure.atomic_numbers)
            # Fractions times cell, whose last digit is the processor's.
            np.testing.assert_allclose(data.positions.numpy(), structure.cart_coords, rtol=0, atol=1e-13)
            assert np.array_equal(data.cell[0].numpy(), structure.lattice.matrix)
            assert float(data.energy) == atoms.get_potential_energy() == record["uncorrected_total_energy"]
            assert np.array_equal(data.forces.numpy(), atoms.get_forces())
            assert np.allclose(data.stress[0].numpy(), atoms.get_stress(voigt=False), rtol=0, atol=1e-15)
            assert np.allclose(data.stress[0].numpy(), np.array(record["stress"]) / -1602.1766, rtol=1e-7, atol=1e-12)


def test_energies_units_and_missing_labels(tmp_path: Path) -> None:
    path = written(tmp_path / "m.json", {"mp-1": {"a-0-0": frame(), "a-0-1": frame(stress=None, force=None)}})
    assert [float(data.energy) for data in read(path, energy="corrected")] == [-7.5, -7.5]
    one, two = read(path)
    assert float(one.energy) == -7.0
    assert np.allclose(one.stress[0].numpy()[0], np.array([10.0, 1.0, 2.0]) * -0.1 * ase.units.GPa, rtol=1e-12)
    assert [two.has_label(label) for label in LABELS] == [True, False, False]
    assert [data.structure_id for data in (one, two)] == ["m.json:mp-1:a-0-0", "m.json:mp-1:a-0-1"]
    (stated, _) = read(path, ReadPolicy(Units.parse({"stress": "GPa"})))
    assert float(stated.stress[0, 0, 0]) == pytest.approx(-100 * KBAR)


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_parts_are_the_whole(tmp_path: Path, style: dict[str, Any]) -> None:
    path = written(tmp_path / "m.json", json.loads(sample().read_text()), **style)
    assert len(read(path)) == 120
    assert_parts(path, divide, read, 1, 12, 20, 1000, most=lambda size: 1.5 * size + 5)


def test_borders_between_parts_are_never_in_a_string(tmp_path: Path) -> None:
    """A material whose texts look like the beginning of another one is not divided."""
    text = ', "mp-9": {"a": {"structure": {'
    content = {f"mp-{k}": {f"a-{n}-0": frame(note=text, mp_id=f"mp-{k}") for n in range(3)} for k in range(4)}
    for style in ({}, {"indent": 1}, {"separators": (",", ":")}):
        path = written(tmp_path / "m.json", content, **style)
        parts = divide(path, 1)
        assert len(parts) == 4
        assert [len(read(path, part=part)) for part in parts] == [3] * 4


def test_numbers_are_exact_to_the_last_digit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    energies = (rng.normal(size=200) * 10.0 ** rng.integers(-5, 5, size=200)).tolist()
    path = written(
        tmp_path / "m.json", {"mp-1": {str(k): frame(uncorrected_total_energy=e) for k, e in enumerate(energies)}}
    )
    assert [float(data.energy) for data in read(path)] == energies


@given(cut=st.integers(1, 10**6))
def test_a_file_that_is_cut_is_not_read_to_a_quiet_end(cut: int) -> None:
    text = json.dumps({f"mp-{k}": {"a-0-0": frame()} for k in range(2)}).encode()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(text[: 1 + cut % (len(text) - 1)])
        file.flush()
        with pytest.raises(DataError):
            read(Path(file.name))


def test_one_material_at_a_time(tmp_path: Path) -> None:
    """Memory is that of a material, not of the file."""
    import tracemalloc

    content = json.dumps({"a-0-0": frame(note="x" * 20_000)})
    path = tmp_path / "m.json"
    with open(path, "w") as file:
        file.write("{" + ",".join(f'"mp-{k}":{content}' for k in range(1500)) + "}")
    assert path.stat().st_size > 30_000_000
    stream = read_mptrj(path, path.name, ReadPolicy(), energy="uncorrected")
    next(stream)
    tracemalloc.start()
    count = sum(1 for _ in stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1499
    assert peak < 12 << 20


def test_what_is_recognised(tmp_path: Path) -> None:
    head = sample().read_bytes()[:4096]
    assert matches(Path("x.json"), head)
    assert not matches(Path("x.txt"), head)
    other = {"a": {"structure": {"@module": "pymatgen.core.structure"}}}
    assert not matches(Path("x.json"), json.dumps(other).encode())
    assert not matches(Path("x.json"), b'[{"structure": {}}]')
    assert matches(Path("x.json"), json.dumps({"m": {"f": {"mp_id": "m"}}}, indent=1).encode())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "damaged or truncated at its beginning"),
        ("[1, 2]", "holds no materials"),
        ("", "damaged or truncated"),
        ("{}", "holds no materials"),
        ('{"a": 1}', "something else than frames"),
        ('{"a": {} "b": {}}', "damaged or truncated"),
        ('{"a": {}} {', "trailing garbage"),
        ('{"a": {"f": 1}}', "something else than frames"),
        ('{"a": {"f": {}, "f": {}}}', "two frames of material a are named 'f'"),
        ('{"a": {"f": {"x": tru}}}', "invalid string in json text"),
        ('{"a": {"f": {"x": NaN}}}', "invalid char in json text"),
        ('{"a": {"f": {}}}', "m.json:a:f: is no frame of MPTrj"),
        ('{"a": {"f": {"x": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": {"f": {"x": ' + "[[]," * 100_000, "nested too deeply"),
    ],
)
def test_damaged_or_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with refusal(message):
        read(path)


@pytest.mark.bad_input
def test_a_cut_file_names_the_last_whole_material(tmp_path: Path) -> None:
    content = json.dumps({f"mp-{k}": {"a-0-0": frame()} for k in range(3)}).encode()
    path = tmp_path / "m.json"
    path.write_bytes(content[: content.index(b', "mp-2"') + 40])
    with pytest.raises(DataError, match=r"m\.json: is damaged or truncated at or after material mp-1"):
        read(path)


@pytest.mark.bad_input
def test_a_material_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mptrj, "MAX_MATERIAL", 1 << 12)
    path = tmp_path / "m.json"
    for text in ('{"a": {"b": [' + "1," * 9000, " " * 9000):
        path.write_text(text)
        with pytest.raises(DataError, match="larger than"):
            read(path)


def site(element: str = "Na", occu: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {"species": [{"element": element, "occu": occu}], "abc": [0.0, 0.0, 0.0], **changes}


def with_sites(*sites: Any) -> dict[str, Any]:
    structure = frame()["structure"]
    return frame(structure={**structure, "sites": list(sites)}, force=None)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (frame(uncorrected_total_energy=None), "uncorrected_total_energy is null; choose the other energy"),
        (frame(mp_id="mp-2"), "has the mp_id 'mp-2', but stands under 'mp-1'"),
        (frame(force=[[0.0] * 3]), r"forces has shape \(1, 3\)"),
        (frame(force="none"), "forces holds something else than numbers"),
        (frame(stress=[1.0] * 6), r"stress has shape \(6,\), expected \(3, 3\)"),
        (frame(stress=[["a"] * 3] * 3), "stress holds something else than numbers"),
        (frame(structure={"sites": []}), "is no pymatgen structure"),
        (frame(structure={"lattice": {"matrix": 3}, "sites": [site()]}), "lattice matrix has shape"),
        (frame(structure={"lattice": {"matrix": [[1]], "pbc": 3}, "sites": [site()]}), "lattice matrix has shape"),
        (with_sites(site(occu=0.5)), "partially occupied"),
        (with_sites(site(species=[{"element": "Na"}, {"element": "K"}])), "partially occupied"),
        (with_sites(site("Xx")), "'Xx' is no element"),
        (with_sites(site("X")), "'X' is no element"),
        (with_sites({"xyz": [0, 0, 0]}), "a site lacks species or abc"),
        (with_sites(3), "a site lacks species or abc"),
        (with_sites(site(abc=[0.0])), "abc of the sites has shape"),
        (with_sites(site(xyz=[0.1, 0.0, 0.0])), "xyz and abc of site 0 are 0.1 Å apart"),
        (with_sites(site(), site()), "atoms 0 and 1 are 0 Å apart"),
    ],
)
def test_bad_frames(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "m.json", {"mp-1": {"a-0-0": record, "a-0-1": frame()}})
    assert "m.json:mp-1:a-0-0" in assert_bad(lambda policy: read(path, policy), message)


@pytest.mark.bad_input
def test_the_energy_must_be_chosen() -> None:
    for choice, message in (
        (None, "energy is not stated; .* MACE-MP .* CHGNet"),
        ("total", "energy 'total' is neither"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(sample(), energy=choice)


def test_registered_targets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "magmom", Target("magmom", True, (), "μB", "μB"))
    path = written(tmp_path / "m.json", {"mp-1": {"a-0-0": frame(magmom=[1.5, -0.25]), "a-0-1": frame()}})
    assert [data.magmom.nan_to_num(9.0).tolist() for data in read(path)] == [[1.5, -0.25], [9.0, 9.0]]
