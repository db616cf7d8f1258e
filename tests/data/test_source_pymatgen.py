from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from escaip.data import LabelKeys
from escaip.data.readers import open_source
from escaip.data.readers.pymatgen import from_pymatgen
from escaip.errors import DataError

FORCES = np.arange(24.0).reshape(8, 3) / 10


def salt() -> Structure:
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    structure.properties.update(energy=-27.0, stress=np.diag([0.1, 0.2, 0.3]).tolist())
    structure.add_site_property("forces", FORCES.tolist())
    return structure


def test_structure_with_properties() -> None:
    data = from_pymatgen(salt())
    assert data.num_nodes == 8
    assert data.pbc.tolist() == [[True, True, True]]
    assert float(data.energy) == -27.0
    assert data.stress[0].diagonal().tolist() == [0.1, 0.2, 0.3]
    assert data.forces.tolist() == FORCES.tolist()
    assert np.allclose(data.positions.numpy(), salt().cart_coords)
    assert data.group == "Cl4Na4"


def test_molecule_with_charge_and_spin() -> None:
    molecule = Molecule(["O", "H"], [[0, 0, 0], [0, 0, 0.97]], charge=-1, spin_multiplicity=1)
    data = from_pymatgen(molecule, labels={"e": -4.0}, keys=LabelKeys.parse({"energy": "e"}))
    assert (int(data.charge), int(data.spin_multiplicity), float(data.energy)) == (-1, 1, -4.0)
    assert not bool(data.pbc.any())


def test_selective_dynamics_fix_atoms() -> None:
    structure = salt()
    structure.add_site_property("selective_dynamics", [[False] * 3] * 4 + [[True, False, True]] * 4)
    assert from_pymatgen(structure).fixed.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("form", ["one", "list", "records", "mapping"])
def test_json_forms(tmp_path: Path, form: str) -> None:
    body = salt().as_dict()
    record = {"structure": body, "dft_energy": -1.5, "material": "salt"}
    content = {"one": body, "list": [body, body], "records": [record], "mapping": {"mp-1": record}}[form]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    named = form in ("records", "mapping")
    keys = {"energy": "dft_energy", "forces": "forces", "group": "material"} if named else None
    read = list(open_source(path, keys=keys))
    assert len(read) == (2 if form == "list" else 1)
    assert float(read[0].energy) == (-1.5 if named else -27.0)
    assert read[0].has_label("forces")
    assert read[0].group == ("salt" if named else "Cl4Na4")
    assert read[0].structure_id == ("s.json:mp-1" if form == "mapping" else "s.json:0")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"structure": ', "not readable as JSON, or truncated"),
        ('[{"@module": "os", "@class": "system", "command": "true", "structure": 1}]', "holds a system"),
        ('[{"structure": {"lattice": 1}}]', "not a readable Structure"),
        ('["structure"]', "expected a structure, found str"),
    ],
)
def test_bad_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_source(path))


@pytest.mark.bad_input
def test_disordered_structures_and_missing_keys() -> None:
    disordered = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(DataError, match="partially occupied"):
        from_pymatgen(disordered)
    with pytest.raises(DataError, match="no energy under the key 'E'; found energy, forces, stress"):
        from_pymatgen(salt(), keys=LabelKeys.parse({"energy": "E"}))
