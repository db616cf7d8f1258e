from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from escaip.data import AtomicData, open_source
from escaip.data.readers.pymatgen import from_pymatgen
from escaip.errors import DataError

FORCES = np.arange(24.0).reshape(8, 3) / 10


def salt() -> Structure:
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    structure.properties.update(energy=-27.0, stress=np.diag([0.1, 0.2, 0.3]).tolist())
    structure.add_site_property("forces", FORCES.tolist())
    return structure


def hydroxide() -> Molecule:
    return Molecule(["O", "H"], [[0, 0, 0], [0, 0, 0.97]], charge=-1)


def read(folder: Path, content: Any, **options: Any) -> list[AtomicData]:
    path = folder / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return list(open_source(path, format="pymatgen", **options))


def test_an_object_and_its_json_are_the_same_structure(tmp_path: Path) -> None:
    structure = salt()
    structure.add_site_property("selective_dynamics", [[False] * 3] * 4 + [[True, False, True]] * 4)
    for data in (from_pymatgen(structure), *read(tmp_path, structure.as_dict())):
        assert data.pbc.tolist() == [[True, True, True]]
        assert float(data.energy) == -27.0
        assert data.stress[0].diagonal().tolist() == [0.1, 0.2, 0.3]
        assert data.forces.tolist() == FORCES.tolist()
        assert np.array_equal(data.positions.numpy(), structure.cart_coords)
        assert np.array_equal(data.cell[0].numpy(), structure.lattice.matrix)
        assert data.fixed.tolist() == [True] * 4 + [False] * 4
        assert data.group == "Cl4Na4"
    bare = from_pymatgen(structure, labels=dict.fromkeys(("energy", "forces", "stress")))
    assert not any(bare.has_label(name) for name in ("energy", "forces", "stress"))


@pytest.mark.parametrize(
    ("molecule", "charge", "spin"),
    [(hydroxide(), -1, 1), (Molecule(["O", "H"], [[0, 0, 0], [0, 0, 0.97]]), 0, 2),
     (Molecule(["O", "O"], [[0, 0, 0], [0, 0, 1.2]], spin_multiplicity=3), 0, 3)],
)  # fmt: skip
def test_molecules_have_charge_and_spin(molecule: Molecule, charge: int, spin: int, tmp_path: Path) -> None:
    record = {"molecule": molecule.as_dict(), "e": -4.0}
    for data in (from_pymatgen(molecule), *read(tmp_path, [record], keys={"energy": "e"})):
        assert (int(data.charge), int(data.spin_multiplicity)) == (charge, spin)
        assert np.array_equal(data.positions.numpy(), molecule.cart_coords)
        assert not bool(data.pbc.any())
    assert float(data.energy) == -4.0


@pytest.mark.parametrize("form", ["one", "list", "records", "mapping"])
def test_json_forms(tmp_path: Path, form: str) -> None:
    body = salt().as_dict()
    arrays = {"@module": "numpy", "@class": "array", "dtype": "float64", "data": FORCES.tolist()}
    record = {"structure": body, "dft_energy": -1.5, "material": "salt", "f": arrays}
    content = {"one": body, "list": [body, body], "records": [record], "mapping": {"mp-1": record}}[form]
    named = form in ("records", "mapping")
    found = read(
        tmp_path, content, keys={"energy": "dft_energy", "forces": "f", "group": "material"} if named else None
    )
    assert len(found) == (2 if form == "list" else 1)
    assert float(found[0].energy) == (-1.5 if named else -27.0)
    assert found[0].forces.tolist() == FORCES.tolist()
    assert found[0].group == ("salt" if named else "Cl4Na4")
    assert found[0].structure_id == ("s.json:mp-1" if form == "mapping" else "s.json:0")


@pytest.mark.bad_input
@pytest.mark.parametrize("place", ["properties", "site", "lattice", "structure"])
def test_no_module_that_a_file_names_is_imported(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_by_data.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    body = json.loads(json.dumps(salt().as_dict()))
    evil = {"@module": "named_by_data", "@class": "Any"}
    if place == "properties":
        body["properties"]["x"] = evil
    elif place == "site":
        body["sites"][0]["properties"]["x"] = [evil]
    else:
        (body if place == "structure" else body["lattice"]).update(evil, **{"@class": "Structure"})
    with pytest.raises(DataError, match=r"^s\.json:0: .*named_by_data"):
        read(tmp_path, [body])
    assert "named_by_data" not in sys.modules


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"structure": ', "not readable as JSON, or truncated"),
        ("[" * 100_000, "not readable as JSON"),
        ('[{"@module": "os", "@class": "system", "command": "true", "structure": 1}]', "holds a os.system"),
        ('[{"structure": {"lattice": 1}}]', "no list of sites"),
        ('[{"structure": {"lattice": 1, "sites": [{}]}}]', "needs lattice and sites"),
        ('[{"molecule": {"sites": [{"xyz": [0, 0, 0]}]}}]', "a site lacks species"),
        ('["structure"]', "expected a structure, found str"),
        ("3", "expected structures, found int"),
    ],
)
def test_bad_json(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


@pytest.mark.bad_input
def test_disordered_structures_and_missing_keys(tmp_path: Path) -> None:
    disordered = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(DataError, match="partially occupied"):
        from_pymatgen(disordered)
    with pytest.raises(DataError, match="partially occupied"):
        read(tmp_path, disordered.as_dict())
    with pytest.raises(DataError, match="no energy under the key 'E'; found energy, forces, stress"):
        read(tmp_path, salt().as_dict(), keys={"energy": "E"})
