"""Many structures at once: the same answers as one by one, in their order, within memory."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice, Molecule, Structure
from tiny import rattled

from escaip.data import AtomicData, collate
from escaip.errors import ConfigError, DataError, UnsupportedElementError, UsageError
from escaip.graph import build_graph, neighbor_list
from escaip.models import EScAIPConfig
from escaip.potential import Potential, PotentialMetadata, predict
from escaip.potential.derivatives import plan_chunks
from escaip.potential.predict import (
    CPU_TOKENS,
    StructurePrediction,
    estimate_tokens,
    is_out_of_memory,
    iter_predict,
    token_budget,
)

ELEMENTS = (1, 6, 7, 8, 13, 29)
make_potential = partial(tiny.make_potential, elements=ELEMENTS)
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
)


class Limited(Potential):
    """A potential on a machine where more than ``most`` atoms at once do not fit; remembers what it was given."""

    most = 10**9
    error: BaseException = OUT_OF_MEMORY[0]

    def forward(self, batch: Any, **options: Any) -> Any:
        """As any potential's."""
        self.__dict__.setdefault("packs", []).append((batch.ptr[1:] - batch.ptr[:-1]).tolist())
        if len(batch.atomic_numbers) > self.most:
            raise type(self.error)(*self.error.args)
        return super().forward(batch, **options)


def structures() -> list[Atoms]:
    """Molecules, a crystal, a slab, a rod, in an order that packing must change."""
    rod = Atoms("C2", positions=[[0, 0, 0], [0.1, 1.3, 0.2]], cell=[[2.6, 0.4, 0], [0, 0, 0], [0, 0, 0]],
                pbc=[True, False, False])  # fmt: skip
    return rattled(
        ase.build.molecule("H2O"), ase.build.bulk("Cu", cubic=True), ase.build.molecule("C6H6"), Atoms("C"),
        ase.build.fcc111("Al", (2, 2, 2), vacuum=5.0), ase.build.molecule("CH3CH2OH"), rod, ase.build.bulk("Cu"),
        ase.build.molecule("NH3"),
    )  # fmt: skip


def waters(count: int) -> list[Atoms]:
    return rattled(*(ase.build.molecule("H2O") for _ in range(count)))


def alone(potential: Potential, structure: Atoms | AtomicData, **options: Any) -> Any:
    data = structure if isinstance(structure, AtomicData) else AtomicData.from_ase(structure)
    with torch.no_grad():
        return potential(collate([data]), create_graph=False, **options)


def check_equal(found: StructurePrediction, expected: Any) -> None:
    assert found.energy == pytest.approx(float(expected.energy[0]), abs=1e-10)
    torch.testing.assert_close(found.atomic_energies, expected.atomic_energies, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-10)
    if expected.stress is not None:
        torch.testing.assert_close(found.stress, expected.stress[0], rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("max_atoms", [None, 1, 9, 1000])
@pytest.mark.parametrize("overrides", [{}, {"forces": "direct"}])
def test_the_same_as_one_by_one_in_the_order_given(max_atoms: int | None, overrides: dict[str, Any]) -> None:
    potential = make_potential(**overrides)
    with_stress = potential.config.is_conservative
    predictions = potential.predict(structures(), compute_stress=with_stress, max_atoms=max_atoms)
    energies = potential.predict(structures(), compute_forces=False, max_atoms=max_atoms)
    for found, only, atoms in zip(predictions, energies, structures(), strict=True):
        assert isinstance(found.energy, float)
        assert found.forces.shape == (len(atoms), 3)
        assert (found.stress is None) != with_stress
        assert found.stress is None or bool(found.stress.isfinite().all()) == (
            atoms.pbc.any() and atoms.cell.volume > 0
        )
        check_equal(found, alone(potential, atoms, compute_stress=with_stress))
        assert only.forces is None is only.stress
        assert only.energy == pytest.approx(found.energy, abs=1e-10)


def test_every_kind_of_structure_and_no_label() -> None:
    """NaN labels would be refused if they were read."""
    potential = make_potential(charge=True)
    atoms = ase.build.molecule("H2O")
    atoms.info["charge"] = -1
    atoms.calc = SinglePointCalculator(atoms, energy=math.nan, forces=np.full((3, 3), math.nan))
    molecule = Molecule(["O", "H", "H"], ase.build.molecule("H2O").positions, charge=-1)
    data = AtomicData.from_arrays(atoms.numbers, atoms.positions, charge=-1)
    crystal = Structure(Lattice.cubic(3.6), ["Cu", "Cu"], [[0, 0, 0], [0.5, 0.5, 0.5]],
                        site_properties={"forces": np.full((2, 3), math.nan)})  # fmt: skip
    neutral = ase.build.molecule("H2O")
    found = potential.predict(iter([atoms, crystal, molecule, data, neutral]))
    assert found[0].energy == pytest.approx(found[2].energy, abs=1e-9) == pytest.approx(found[3].energy, abs=1e-12)
    assert abs(found[4].energy - found[0].energy) > 1e-6
    bulk = Atoms("Cu2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[3.6] * 3, pbc=True)
    check_equal(found[1], alone(potential, bulk))


def test_each_structure_has_the_references_of_its_own_set() -> None:
    potential = make_potential()
    potential.set_metadata(PotentialMetadata(elements=ELEMENTS, datasets=("first", "second")))
    potential.element_references = torch.stack([torch.zeros(119), torch.full((119,), 100.0)]).double()
    potential.scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    data = [AtomicData.from_ase(atoms) for atoms in waters(3)]
    data[0].dataset = torch.tensor([1])
    with pytest.raises(ConfigError, match="references for each of first, second"):
        potential.predict(data)
    potential.choose_dataset("first")
    energies = [found.energy for found in potential.predict(data)]
    assert [energy > 200.0 for energy in energies] == [True, False, False]
    for found, structure in zip(potential.predict(data), data, strict=True):
        check_equal(found, alone(potential, structure))


def test_nothing_is_changed_and_results_own_their_memory() -> None:
    data = [AtomicData.from_ase(atoms) for atoms in structures()]
    before = [item.clone() for item in data]
    potential = make_potential()
    with torch.inference_mode():
        predictions = potential.predict(data)
    for item, copy, found in zip(data, before, predictions, strict=True):
        for key, value in copy._store.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(item._store[key], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert item._store[key] == value
        assert found.forces.untyped_storage().nbytes() == item.num_nodes * 24
        assert not found.forces.requires_grad
        assert not found.atomic_energies.requires_grad


def test_neighbor_lists_of_some_structures_do_not_matter() -> None:
    potential = make_potential()
    data = [AtomicData.from_ase(atoms) for atoms in waters(2)]
    pairs = neighbor_list(collate([data[1]]), potential.search_cutoff)
    data[1].edge_index = torch.stack([pairs.center, pairs.neighbor])
    data[1].edge_shift, data[1].edge_cutoff = pairs.shift, torch.tensor([pairs.cutoff])
    for found, atoms in zip(potential.predict(data), waters(2), strict=True):
        check_equal(found, alone(potential, atoms))


def test_the_shortest_of_the_neighbor_lists_must_suffice() -> None:
    potential = make_potential()
    data = [AtomicData.from_ase(atoms) for atoms in waters(2)]
    for item, cutoff in zip(data, (potential.search_cutoff, potential.cutoff), strict=True):
        pairs = neighbor_list(collate([item]), cutoff)
        item.edge_index = torch.stack([pairs.center, pairs.neighbor])
        item.edge_shift, item.edge_cutoff = pairs.shift, torch.tensor([cutoff], dtype=torch.float64)
    with pytest.raises(UsageError, match="neighbor list reaches"):
        potential(collate(data))


def test_packs_keep_to_the_budget_and_hold_structures_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = make_potential(kind=Limited)
    benzenes = [ase.build.molecule("C6H6") for _ in range(10)]
    mixed = [atoms for pair in zip(waters(10), benzenes, strict=True) for atoms in pair]
    potential.predict(mixed, max_atoms=48)
    assert potential.packs == [[12] * 4, [12] * 4, [12, 12] + [3] * 8, [3, 3]]
    potential.packs.clear()
    potential.predict(mixed)  # 10 waters and 10 benzenes are far fewer tokens than the budget
    assert len(potential.packs) == 1
    potential.packs.clear()
    monkeypatch.setattr(predict, "_LOOKAHEAD_STRUCTURES", 5)  # however small the structures
    potential.predict(waters(12))
    assert [len(pack) for pack in potential.packs] == [5, 5, 2]


def test_a_stream_is_read_as_results_are_taken() -> None:
    taken = 0

    def endless() -> Iterator[Atoms]:
        nonlocal taken
        while True:
            taken += 1
            yield ase.build.molecule("H2O")

    results = iter_predict(make_potential(), endless(), max_atoms=6)
    assert taken == 0
    next(results)
    assert taken == 16 * 2
    for _ in range(31):
        next(results)
    assert taken == 16 * 2
    next(results)
    assert taken == 16 * 4


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:2], ids=lambda error: type(error).__name__)
def test_smaller_packs_where_memory_runs_out(error: BaseException) -> None:
    potential = make_potential(kind=Limited)
    potential.most, potential.error = 10, error
    expected = make_potential().predict(waters(20), max_atoms=1)
    # One line, when it has ended well.
    message = "out of memory with 16 structures (48 atoms) on cpu: from here on at most 6 atoms at once"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        predictions = potential.predict(waters(20), max_atoms=48)
    assert len(caught) == 1
    sizes = [sum(pack) for pack in potential.packs]
    assert sizes[:4] == [48, 24, 12, 6]
    assert set(sizes[4:]) == {6}  # the smaller budget is kept
    for found, want in zip(predictions, expected, strict=True):
        assert found.energy == pytest.approx(want.energy, abs=1e-10)
        torch.testing.assert_close(found.forces, want.forces, rtol=0, atol=1e-10)


def test_one_structure_that_does_not_fit_is_named() -> None:
    potential = make_potential(kind=Limited)
    potential.most, potential.error = 8, OUT_OF_MEMORY[1]
    given = [*waters(3), ase.build.molecule("CH3CH2OH"), *waters(3)]
    with pytest.raises(DataError) as raised:
        potential.predict(given)
    assert str(raised.value) == (
        "structure 3 (C2H6O, 9 atoms) does not fit into the memory of cpu even alone "
        "([enforce fail at alloc_cpu.cpp:127] err == 0): use dtype='float32', a smaller structure, a smaller model or "
        "a machine with more memory"
    )
    assert raised.value.__cause__ is None  # nothing that holds the tensors of the attempt
    assert raised.value.__context__ is None


class _Failing(torch.autograd.Function):
    """Runs out of memory in the backward pass of more than 20 rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        if len(gradients[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients[0]


def _bytes_in_tensors() -> int:
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def _branch(module: torch.nn.Module, arguments: Any, out: torch.Tensor) -> torch.Tensor:
    """A hook that leaves the derivative of one branch to be done when that of the other fails."""
    earlier = out.tanh()
    return _Failing.apply(out) + earlier


def test_the_next_attempt_begins_with_the_memory_of_the_one_that_failed() -> None:
    """PyTorch's engine keeps what it has still to do, and with it the graph: 1.6 MB here."""
    potential = make_potential(num_layers=3)
    potential.model.blocks[2].norm_node_ffn.register_forward_hook(_branch)
    held: list[int] = []
    potential.register_forward_pre_hook(lambda *_: held.append(_bytes_in_tensors()))
    with pytest.warns(UserWarning, match=r"36 atoms\).*at most 18 atoms"):
        potential.predict(waters(12), max_atoms=100)
    assert len(held) == 3
    assert held[1] - held[0] < 5_000
    assert held[2] - held[1] < 5_000


def test_another_error_is_not_taken_for_memory() -> None:
    potential = make_potential(kind=Limited)
    potential.most, potential.error = 0, RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        potential.predict(waters(4))
    assert len(potential.packs) == 1
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not is_out_of_memory(DataError("out of memory"))


def water_with(**changes: Any) -> AtomicData:
    data = AtomicData.from_ase(ase.build.molecule("H2O"))
    for name, value in changes.items():
        setattr(data, name, value)
    return data


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        (Atoms("Fe"), UnsupportedElementError, r"^structure 2 \(Fe\): the potential was not trained on Fe"),
        (water_with(charge=torch.tensor([10_000])), DataError, r"^structure 2 \(H2O\): total charge outside"),
        (Atoms("H2", positions=np.zeros((2, 3))), DataError, "^structure 2: H2: atoms 0 and 1 are 0 Å apart"),
        (water_with(positions=torch.full((3, 3), torch.nan)), DataError, r"^structure 2 \(H2O\): system 0, atom 0"),
        ("H2O", UsageError, r"structure 2 is a str: predict takes ase\.Atoms"),
    ],
)  # fmt: skip
def test_bad_structures_are_named_by_index(structure: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_potential(charge=True).predict([*waters(2), structure, *waters(2)])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ase.build.molecule("H2O"), "got one Atoms: pass a list of it"),
        (water_with(), "got one AtomicData: pass a list"),
        (Molecule(["H"], [[0, 0, 0]]), "got one Molecule: pass a list"),
        (collate([water_with()]), r"not a batch: call potential\(batch\)"),
        ("data.extxyz", "not the path 'data.extxyz'"),
        (3, "got int"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_series_of_structures(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_potential().predict(given)


@pytest.mark.bad_input
def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_atoms is 0"):
        make_potential().predict(waters(1), max_atoms=0)
    with pytest.raises(ConfigError, match="direct-force model has no stress"):
        make_potential(forces="direct").predict(waters(1), compute_stress=True)
    with pytest.raises(UsageError, match=r"training mode.*eval\(\)"):
        make_potential().train().predict(waters(1))


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_potential().predict([]) == []
    for progress in (False, True):
        make_potential().predict(waters(3), progress=progress)
        assert ("3/3" in capsys.readouterr().err) == progress


@pytest.mark.parametrize("num_neighbors", [30, None])
def test_tokens_are_estimated_from_density_and_cutoff(num_neighbors: int | None) -> None:
    settings = EScAIPConfig(num_neighbors=num_neighbors).graph
    boxed = ase.build.molecule("H2O", cell=[20.0] * 3, pbc=True)  # periodic, but no image within reach
    boxed.positions += [0.0, 0.0, 19.8]  # across the boundary
    dense = Atoms("H", cell=[1.4] * 3, pbc=True)
    skewed = ase.build.bulk("Cu") * (5, 5, 5)
    sparse = Atoms("H40", positions=[[8.0 * index, 0.0, 0.0] for index in range(40)])
    for atoms in [*structures(), boxed, dense, skewed, sparse, ase.build.molecule("C60")]:
        data = AtomicData.from_ase(atoms)
        exact = build_graph(collate([data]), settings).num_tokens
        # Of the k nearest a soft k-NN graph keeps two thirds where shells are full.
        assert 0.75 * exact <= estimate_tokens(data, settings) <= (1.8 if num_neighbors else 1.3) * exact


def test_the_budget_follows_device_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EScAIPConfig.preset("20m")

    def budget(device: str, free: float | None, derivatives: bool = True) -> int:
        monkeypatch.setattr(predict, "_free_bytes", lambda _: free)
        potential: Any = SimpleNamespace(config=config, device=torch.device(device), dtype=torch.float32)
        return token_budget(potential, derivatives)

    each = 4 * config.used_per_token(True)
    assert budget("cpu", None) == budget("cpu", 1e12) == CPU_TOKENS
    assert budget("cpu", 200.0 * each) == 100
    assert budget("cuda", 20_000.0 * each) == 10_000
    assert budget("cuda", 20_000.0 * each, derivatives=False) > 10_000
    assert budget("cpu", 0.0) == 1
    most = budget("cuda", 1e12)
    assert not plan_chunks(config, most, torch.device("cuda"))[1]
    assert plan_chunks(config, most + most // 8, torch.device("cuda"))[1]
    monkeypatch.undo()
    assert 1 <= token_budget(make_potential()) <= CPU_TOKENS
