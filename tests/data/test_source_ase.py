from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from tiny import make_potential
from toys import refusal

from escaip.cli import main
from escaip.data import AtomicData, AtomicDataModule, Store
from escaip.data.prepare import prepare
from escaip.data.readers import Reading, ReadReport, detect_format, list_files, open_source, read_file
from escaip.data.readers.policy import ReadPolicy
from escaip.errors import ConfigError, DataError

ETHANOL = "molecular/md17_ethanol_UNITS_kcal.xyz"
ASPIRIN = "molecular/aspirin_UNITS_meV.xyz"
FRAME = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy}\nC 0 0 0 0 0 0\nO 0 0 {z} 0 0 0\n"


def assert_equal_to_ase(path: Path, index: str = ":", **options: object) -> None:
    """Numbers against ASE's own reading, without its constraints."""
    ours = list(open_source(path, index=index, **options))
    theirs = ase.io.read(path, index)
    assert len(ours) == len(theirs) > 0
    for data, atoms in zip(ours, theirs, strict=True):
        assert np.array_equal(data.positions.numpy(), atoms.positions)
        assert np.array_equal(data.cell[0].numpy(), np.asarray(atoms.cell))
        assert np.array_equal(data.pbc[0].numpy(), atoms.pbc)
        results = atoms.calc.results
        assert float(data.energy) == results["energy"]
        assert np.array_equal(data.forces.numpy(), results["forces"])
        if "stress" in results:
            voigt = data.stress[0].numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            assert np.allclose(voigt, results["stress"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "molecular/3bpa_train_300K.xyz",
        "materials/mptrj_random.extxyz",
        "materials/mvl_Li_train.extxyz.gz",
        "catalysts/oc20_dft_traj/random1000100.traj",
        "catalysts/w_be_surfaces.extxyz.gz",
        "native_formats/ase_db_genuine/10_mptraj_systems.db",
    ],
)
def test_real_files_equal_ase(shared_data: Callable[[str], Path], name: str) -> None:
    assert_equal_to_ase(shared_data(name), "0:40")


def test_constraints_and_tags_of_oc20(shared_data: Callable[[str], Path]) -> None:
    data = next(open_source(shared_data("native_formats/oc20_s2ef_extxyz_derived/0.extxyz.xz"), format="ase"))
    assert int(data.fixed.sum()) == 17
    assert set(data.tags.tolist()) == {0, 1, 2}
    assert bool((data.fixed == (data.tags == 0)).all())


def test_database_with_labels_in_data(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("native_formats/ase_db_genuine/ase_carbene_2200.db")
    keys = {"energy": "energy", "forces": "forces", "charge": "total_charge"}
    # It keeps the number of unpaired electrons under this name.
    with pytest.raises(DataError, match="spin multiplicity is 0, which looks like a number of unpaired electrons"):
        list(open_source(path, keys=keys))
    ours = list(open_source(path, keys={**keys, "spin": "ignore"}, index="::500"))
    assert len(ours) == 5
    with ase.db.connect(path) as database:
        for data in ours:
            row = database.get(id=int(data.structure_id.rsplit(":", 1)[1]))
            assert float(data.energy) == row.data["energy"][0]
            assert np.array_equal(data.forces.numpy(), row.data["forces"])
            assert int(data.charge) == row.data["total_charge"][0]


def test_named_keys(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("molecular/solvent_xtb_train.xyz")
    keys = {"energy": "energy_xtb", "forces": "forces_xtb"}
    ours = list(open_source(path, keys=keys))
    theirs = ase.io.read(path, ":")
    assert [float(data.energy) for data in ours] == [atoms.info["energy_xtb"] for atoms in theirs]
    assert all(np.array_equal(a.forces.numpy(), b.arrays["forces_xtb"]) for a, b in zip(ours, theirs, strict=True))
    assert ours[-1].group == theirs[-1].symbols.formula.format("hill")


@pytest.mark.parametrize("opener", [gzip.open, lzma.open])
def test_compressed_files(xyz_file: Path, tmp_path: Path, opener: Callable) -> None:
    path = tmp_path / ("a.extxyz.gz" if opener is gzip.open else "a.extxyz.xz")
    with opener(path, "wt") as file:
        file.write(xyz_file.read_text())
    a, b = list(open_source(path)), list(open_source(xyz_file))
    assert len(a) == 60
    assert all((x.forces == y.forces).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("index", ["0:60:7", "5:9", "-4:", "::-20", ":-50", "3", "-1", "58:200", "7:7"])
def test_slices_equal_list_slices(xyz_file: Path, index: str) -> None:
    everything = list(open_source(xyz_file))
    if ":" in index:
        expected = everything[slice(*[int(x) if x else None for x in index.split(":")])]
    else:
        expected = [everything[int(index)]]
    assert [data.structure_id for data in open_source(xyz_file, index=index)] == [
        data.structure_id for data in expected
    ]


def test_ids_are_stable_and_distinct_over_files(xyz_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "b" / xyz_file.name
    other.parent.mkdir()
    other.write_text(xyz_file.read_text())
    ids = [data.structure_id for data in open_source([xyz_file, other])]
    assert len(set(ids)) == 120
    assert ids == [data.structure_id for data in open_source([xyz_file, other])]
    assert ids[60].startswith("b/")


def test_groups(xyz_file: Path, frames: list[Atoms], tmp_path: Path) -> None:
    assert {data.group for data in open_source(xyz_file)} == {"CH4", "H3N", "H2O", "C2H6O", "CO2", "Cu4"}
    assert {data.group for data in open_source(xyz_file, group_by="file")} == {"made.extxyz"}
    assert len({data.group for data in open_source(xyz_file, group_by="structure")}) == 60
    for k, atoms in enumerate(frames):
        atoms.info["mol"] = f"m{k % 3}"
    path = tmp_path / "named.extxyz"
    ase.io.write(path, frames)
    assert {data.group for data in open_source(path, keys={"group": "mol"})} == {"m0", "m1", "m2"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "unit", "expected"), [(ETHANOL, "kcal/mol", 2.02), (ASPIRIN, "meV", 2.2)], ids=["ethanol", "aspirin"]
)
def test_units_are_refused_by_name_until_they_are_stated(
    shared_data: Callable[[str], Path], name: str, unit: str, expected: float
) -> None:
    path = shared_data(name)
    with pytest.raises(DataError, match=rf"{path.name}:0: energy .*looks like {unit}.*units: {{energy: {unit}}}"):
        next(open_source(path))
    with pytest.raises(DataError, match=f"forces of .* look like {unit}/Å"):
        next(open_source(path, keys={"forces": "forces"}))
    read = list(open_source(path, units={"energy": unit}, limit=200))
    rms = np.sqrt(np.mean([(data.forces.numpy() ** 2).sum(1).mean() for data in read]))
    assert rms == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "name",
    ["materials/mptrj_highest_stress.extxyz", "materials/hea25_pbesol_100.xyz", "molecular/acac_train_300K.xyz"],
)
def test_right_units_are_not_refused(shared_data: Callable[[str], Path], name: str) -> None:
    assert sum(1 for _ in open_source(shared_data(name), limit=300)) >= 100


def scaled(frames: list[Atoms], length: float) -> None:
    for atoms in frames:
        atoms.positions *= length
        atoms.cell *= length


def with_one_energy(frames: list[Atoms]) -> None:
    frames[7].calc.results["energy"] *= 23.06


def with_kbar(frames: list[Atoms]) -> None:
    for atoms in frames[50:]:
        atoms.calc.results["stress"] = atoms.calc.results["stress"] * 1602.2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames: scaled(frames, 1 / 0.529177), "length: bohr"),
        (lambda frames: scaled(frames, 0.1), "length: nm"),
        (with_one_energy, r"made.traj:7: energy .* same composition .* mixed units"),
        (with_kbar, r"stress of .* kbar.*units: {stress: kbar}"),
    ],
)
def test_other_units_are_refused(
    frames: list[Atoms], tmp_path: Path, change: Callable[[list[Atoms]], None], message: str
) -> None:
    change(frames)
    ase.io.write(tmp_path / "made.traj", frames)
    with pytest.raises(DataError, match=message):
        list(open_source(tmp_path / "made.traj"))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.xyz", "", "is empty"),
        ("a.qqq", "hello world\n", "does not know this format"),
        (
            "cut.xyz",
            FRAME.format(energy=1, z=1.1) + "\n".join(FRAME.format(energy=1, z=1.1).split("\n")[:3]) + "\n",
            "truncated after 1",
        ),
        ("halfline.xyz", FRAME.format(energy=1, z=1.1)[:-8], "truncated after 0"),
        ("text.xyz", "this is no structure\nat all\n", "truncated after 0"),
        ("nan.xyz", FRAME.format(energy=1, z="nan"), "nan.xyz:0: coordinates of atom 1 are NaN"),
        ("nanlabel.xyz", FRAME.format(energy="nan", z=1.1), "nanlabel.xyz:0: energy holds NaN"),
        ("overlap.xyz", FRAME.format(energy=1, z=1.1) + FRAME.format(energy=1, z=0.01), "overlap.xyz:1: atoms 0 and 1"),
        ("notadb.db", "no sqlite here", "not a readable ASE database"),
    ],
)
def test_bad_files(write_xyz: Callable[[str, str], Path], name: str, text: str, message: str) -> None:
    with refusal(message):
        list(open_source(write_xyz(name, text)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lmdb"}, "format: 'lmdb' is not one of store"),
        ({"on_error": "ignore"}, "on_error: 'ignore'"),
        ({"index": "first"}, "index: 'first'"),
        ({"group_by": "colour"}, "group_by: 'colour'"),
        ({"subset": "x"}, "has no option 'subset'"),
        ({"keys": {"stress": "s", "virial": "v"}}, "stress or virial"),
    ],
)
def test_bad_options(xyz_file: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(open_source(xyz_file, **options))


@pytest.mark.bad_input
@pytest.mark.parametrize("layout", ["mptrj", "oc20", "ocp_lmdb", "pyg", "spice", "store"])
def test_layouts_that_fix_their_names_take_no_keys(xyz_file: Path, layout: str) -> None:
    with pytest.raises(ConfigError, match=f"keys: the {layout} layout fixes its names; drop keys"):
        open_source(xyz_file, format=layout, keys={"energy": "e"})


@pytest.mark.bad_input
def test_nothing_there_and_missing_labels(tmp_path: Path, write_xyz: Callable[[str, str], Path]) -> None:
    for path, message in (
        ("/nowhere/at.all", "no such file"),
        ("/nowhere/*.xyz", "no file matches"),
        (tmp_path, "no prepared store"),
    ):
        with pytest.raises(DataError, match=message):
            list(open_source(path))
    path = write_xyz("a.xyz", FRAME.format(energy=1, z=1.1).replace("energy=", "energy_xtb="))
    with pytest.raises(DataError, match=r"a.xyz:0: has no energy.*found info: energy_xtb.*keys: {energy: KEY}"):
        list(open_source(path, required_labels=["energy"]))


def test_bad_structures_are_skipped_and_counted(write_xyz: Callable[[str, str], Path]) -> None:
    good, bad = FRAME.format(energy=1, z=1.1), FRAME.format(energy=1, z=0.01)
    report = ReadReport()
    read = list(open_source(write_xyz("mix.xyz", good + bad + good), on_error="skip", report=report))
    assert [data.structure_id for data in read] == ["mix.xyz:0", "mix.xyz:2"]
    assert (report.read, report.skipped) == (2, 1)
    assert "mix.xyz:1" in report.messages[0]


def test_formats_are_found_by_content(tmp_path: Path, xyz_file: Path) -> None:
    renamed = tmp_path / "spice.dat"
    renamed.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert detect_format(renamed) == "spice"
    assert detect_format(xyz_file) == "ase"


def test_bulk_with_a_shared_cell_keeps_pbc(tmp_path: Path) -> None:
    path = tmp_path / "slab@300K.traj"  # which ASE would read as frame 300K of slab
    ase.io.write(path, ase.build.fcc111("Cu", (1, 1, 3), vacuum=5.0))
    assert next(open_source(path)).pbc.tolist() == [[True, True, False]]


def test_max_force_leaves_out_and_counts(xyz_file: Path) -> None:
    whole = list(open_source(xyz_file))
    largest = [float(data.forces.norm(dim=1).max()) for data in whole]
    limit = sorted(largest)[len(largest) // 2]
    report = ReadReport()
    kept = list(open_source(xyz_file, max_force=limit, report=report))
    assert [data.structure_id for data in kept] == [
        data.structure_id for data, force in zip(whole, largest, strict=True) if force <= limit
    ]
    assert report.filtered == len(whole) - len(kept) > 0
    assert report.skipped == 0
    assert f"{report.filtered} filtered out" in report.summary()
    assert "above max_force" in report.messages[0]


def test_fixed_atoms_do_not_count_for_max_force(frames: list[Atoms], tmp_path: Path) -> None:
    atoms = frames[0]
    atoms.calc.results["forces"][0] = [12.0, 0.0, 0.0]
    atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "fixed.traj", atoms)
    assert len(list(open_source(tmp_path / "fixed.traj", max_force=10.0))) == 1


def test_parts_of_a_database_make_the_whole(frames: list[Atoms], tmp_path: Path) -> None:
    path = tmp_path / "made.db"
    with ase.db.connect(path) as database:
        for atoms in frames:
            database.write(atoms)
        database.delete([5, 6])
    file = list_files(path)[0]
    parts = file.parts(7)
    assert len(parts) == -(-(len(frames) - 2) // 7)
    pieces = [data.structure_id for part in parts for data in read_file(file, ReadPolicy(), part=part)]
    assert pieces == [data.structure_id for data in open_source(path)]


@pytest.mark.bad_input
def test_a_blank_line_between_frames_loses_nothing_silently(
    xyz_file: Path, write_xyz: Callable[[str, str], Path]
) -> None:
    text = xyz_file.read_text()
    lines = text.splitlines(keepends=True)
    count = int(lines[0]) + 2
    path = write_xyz("blank.xyz", "".join([*lines[:count], "\n", *lines[count:]]))
    with pytest.raises(
        DataError, match=r"blank.xyz: damaged or truncated after 1 .*a blank line stands between frames"
    ):
        list(open_source(path))
    assert len(list(open_source(write_xyz("end.xyz", text + "\n\n")))) == 60


@pytest.fixture
def partly_labelled(tmp_path: Path) -> list[Path]:
    """Two files of five frames; all frames of the first and one of the second lack forces, two of each a virial."""
    paths = []
    for number in range(2):
        frames = []
        for index in range(5):
            atoms = ase.build.bulk("Cu", cubic=True)
            atoms.rattle(0.05, seed=5 * number + index)
            atoms.info["E"] = -14.0
            if number and index != 3:
                atoms.arrays["F"] = np.ones((4, 3))
            if index > 1:
                atoms.info["W"] = np.eye(3)
            frames.append(atoms)
        paths.append(tmp_path / f"{number}.extxyz")
        ase.io.write(paths[-1], frames)
    return paths


NAMED = {"energy": "E", "forces": "F", "virial": "W"}


def test_a_named_label_may_be_absent_in_some_structures_which_are_counted(
    partly_labelled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ReadReport()
    found = list(open_source(partly_labelled, keys=NAMED, report=report))
    assert report.absent == {"forces": 6, "virial": 4}
    assert [data.has_label("forces") for data in found] == [False] * 5 + [True, True, True, False, True]
    assert [data.has_label("stress") for data in found] == [False, False, True, True, True] * 2
    assert report.summary() == "10 structures read, 0 skipped, 6 without forces, 4 without virial"
    prepared = prepare(partly_labelled, tmp_path / "store", reading=Reading(keys=NAMED), workers=1)
    assert "structures without forces 6, without virial 4" in prepared.summary()
    assert Store(tmp_path / "store").manifest["read"]["absent"] == {"forces": 6, "virial": 4}
    data = {"path": [*map(str, partly_labelled)], "keys": NAMED}
    module = AtomicDataModule(data, max_atoms=60, required_labels=("energy",), split={"val": 0})
    module.setup("fit")
    assert "10 structures read, 0 skipped, 6 without forces, 4 without virial" in module.summary()
    make_potential().save(tmp_path / "m.escaip")
    command = ["evaluate", str(tmp_path / "m.escaip"), str(partly_labelled[1]), "--no-plots", "--out", str(tmp_path)]
    assert main([*command, *(f"--keys.{name}={key}" for name, key in NAMED.items())]) == 0
    assert "5 structures read, 0 skipped, 2 without virial, 1 without forces" in capsys.readouterr().out


@pytest.mark.bad_input
def test_a_named_label_that_no_structure_has_is_refused(partly_labelled: list[Path], tmp_path: Path) -> None:
    for keys, label in (({**NAMED, "energy": "e"}, "energy"), ({"virial": "w"}, "virial")):
        message = rf"no {label} under the key '.'; found info: E.*; arrays: none; calculator: .*; name one of these"
        with pytest.raises(DataError, match=message):
            next(open_source(partly_labelled, keys=keys))
        with pytest.raises(DataError, match=message):
            prepare(partly_labelled, tmp_path / "store", reading=Reading(keys=keys), workers=1, restart=True)
        assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="no forces under the key 'F'"):
        list(open_source(partly_labelled[0], keys=NAMED))
    with pytest.raises(DataError, match="no charge under the key 'q'"):  # an input is no label
        list(open_source(partly_labelled[1], keys={**NAMED, "charge": "q"}))
    with pytest.raises(DataError, match="no forces under the key 'F'"):
        AtomicData.from_ase(ase.io.read(partly_labelled[0]), keys=NAMED)
