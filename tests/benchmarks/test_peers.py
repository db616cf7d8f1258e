"""The comparison with other potentials: its plan, environments, processes, turns and tables. Installs nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers import environments, plan, report, run, structures  # noqa: E402
from peers.environments import EnvironmentFailure  # noqa: E402
from peers.measure import Contender, Row, evaluations_per_turn, measure_case  # noqa: E402
from peers.workers import Worker, WorkerFailure  # noqa: E402

COPPER = {"numbers": [29], "positions": [[0.0, 0.0, 0.0]], "cell": np.eye(3).tolist(), "pbc": [True] * 3}

ADAPTER = '''
"""A model whose energy is the sum of its coordinates."""
import numpy as np

class Model:
    parameters = 7
    notes = ["fake"]

    def __init__(self, factor):
        self.factor = factor

    def inference(self, structure):
        if structure["numbers"] == [0]:
            raise ValueError("no element 0\\nsecond line")
        return self

    def prepare(self, positions):
        return positions[0]

    def run(self, positions):
        return {"energy": self.factor * float(positions.sum())}

def build(options):
    print("noise that must not be taken for a reply")
    return Model(**options)
'''


class FakeWorker:
    """Answers at once, and writes down who was asked what; dies at a given turn."""

    def __init__(self, name: str, seconds: float, journal: list[tuple[str, str]], dies_at: int | None = None) -> None:
        self.name, self.seconds, self.journal, self.dies_at = name, seconds, journal, dies_at
        self.is_alive = True

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.journal.append((self.name, do))
        if do == "turn" and arguments["number"] == self.dies_at:
            self.is_alive = False
            raise WorkerFailure("the process was killed by signal 9: nothing was printed")
        if do == "warm_up":
            return {"seconds": [3.0, self.seconds], "answer": {"energy": 2.0}}
        if do == "turn":
            return {"seconds": [self.seconds * (1 + arguments["number"])] * arguments["count"]}
        return {"growth_MiB": 5.0}


def contender(name: str, seconds: float, journal: list[tuple[str, str]], dies_at: int | None = None) -> Contender:
    worker: Any = FakeWorker(name, seconds, journal, dies_at)
    return Contender(plan.Variant(name, "escaip"), worker, {"parameters": 10})


def row(variant: str, turns: list[float], atoms: int = 10, suite: str = "inference", **more: Any) -> Row:
    return Row(suite, f"{atoms}", atoms, variant, "escaip", 1000, turns, **more)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The real process with a model of our own."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "fake_adapter.py").write_text(ADAPTER, encoding="utf-8")
    variables = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with Worker(Path(sys.executable), "fake", folder / "log", variables, 60.0) as process:
        process.ask("build", options={"factor": 2.0}, threads=1, memory_GiB=8.0)
        yield process


def test_plan_names_what_exists() -> None:
    names = [variant.name for variant in plan.VARIANTS]
    assert len(set(names)) == len(names)
    for variant in plan.VARIANTS:
        assert variant.peer in environments.PEERS
        assert (BENCHMARKS / "peers" / "adapters" / f"{variant.peer}_adapter.py").exists()
        assert set(variant.suites) <= set(plan.SUITES)
    assert plan.REFERENCE in names
    for relation in plan.RELATIONS:
        assert {relation.ours, relation.theirs} <= set(names)


def test_weights_are_left_before_they_are_taken() -> None:
    names = [variant.name for variant in plan.VARIANTS]
    takers = [variant for variant in plan.VARIANTS if "weights" in variant.options]
    assert takers
    for taker in takers:
        assert names.index(plan.exporter(taker.options["weights"])) < names.index(taker.name)


def test_plan_covers_what_was_asked() -> None:
    training = {variant.peer for variant in plan.chosen(list(environments.PEERS), ["training"])}
    assert training == {"escaip", "fairchem", "mace"}
    assert {variant.peer for variant in plan.chosen(list(environments.PEERS), ["cost"])} == {"escaip", "fairchem"}
    assert {variant.peer for variant in plan.VARIANTS} == set(environments.PEERS)
    assert [variant.name for variant in plan.chosen(["mace"], ["inference"], ["MACE-MP-0 small"])] == [
        "MACE-MP-0 small"
    ]


def test_groups_hold_relations_and_the_reference() -> None:
    groups = plan.grouped(list(plan.VARIANTS))
    assert tuple(groups) == plan.GROUPS
    names = [{variant.name for variant in members} for members in groups.values()]
    assert names[0] & names[1] == {plan.REFERENCE}
    assert names[0] | names[1] == {variant.name for variant in plan.VARIANTS}
    for relation in plan.RELATIONS:
        assert sum({relation.ours, relation.theirs} <= members for members in names) == 1
    assert list(plan.grouped(plan.chosen(["mace"], ["inference"]))) == ["others"]


def test_structures_are_those_promised() -> None:
    cases = structures.inference_cases()
    assert [len(item["numbers"]) for item in cases.values()] == [21, 216, 500, 512, 648]
    assert cases == structures.inference_cases()
    perfect = structures.aspirin().positions
    moved = np.array(cases["aspirin"]["positions"]) - perfect
    assert 0.03 < moved.std() < 0.07
    for structure in (*cases.values(), *(x for group in structures.training_cases().values() for x in group)):
        assert nearest(structure) > 0.7
    assert [[len(x["numbers"]) for x in group] for group in structures.training_cases().values()] == [
        [21] * 8,
        [32] * 8,
    ]
    for atoms in structures.COST_ATOMS:
        assert len(structures.copper(atoms)) == atoms


def test_training_comes_last() -> None:
    """It changes the weights that the other suites compare."""
    suites = [suite for suite, _, _ in run.cases(list(plan.SUITES))]
    assert suites == sorted(suites, key=["inference", "cost", "training"].index)
    assert len(suites) == 5 + len(structures.COST_ATOMS) + 2


def nearest(structure: dict[str, Any]) -> float:
    """Å between the two closest atoms, images included."""
    from ase import Atoms
    from ase.neighborlist import neighbor_list

    atoms = Atoms(structure["numbers"], structure["positions"], cell=structure["cell"], pbc=structure["pbc"])
    return float(neighbor_list("d", atoms, 1.7).min(initial=1.7))


@pytest.mark.bad_input
def test_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mace").mkdir()
    (tmp_path / "mace" / "precious").write_text("mine", encoding="utf-8")
    with pytest.raises(EnvironmentFailure, match="was not made by this command"):
        environments.interpreter("mace", tmp_path)
    assert (tmp_path / "mace" / "precious").exists()


def test_environment_is_made_once_and_again_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(path: Path, requirement: environments.Requirement, index: str | None) -> None:
        made.append(requirement.packages[0])
        if len(made) == 1:
            raise EnvironmentFailure("the network is away")
        (path / "bin").mkdir()
        (path / "bin" / "python").touch()

    monkeypatch.setattr(environments, "_make", make)
    with pytest.raises(EnvironmentFailure, match="network"):
        environments.interpreter("orb", tmp_path)
    python = environments.interpreter("orb", tmp_path)
    assert python == tmp_path / "orb" / "bin" / "python"
    assert environments.interpreter("orb", tmp_path) == python
    assert len(made) == 2
    monkeypatch.setitem(environments.REQUIREMENTS, "orb", environments.Requirement(("orb-models==9.9",)))
    environments.interpreter("orb", tmp_path)
    assert made[2:] == ["orb-models==9.9"]


def test_pip_failures_are_one_line(tmp_path: Path) -> None:
    output = "Collecting nowhere\nERROR: No matching distribution found for nowhere\n\nERROR: more\n"
    assert environments.failure_line(output) == "ERROR: No matching distribution found for nowhere"
    assert environments.failure_line("") == "it ended without a word"
    with pytest.raises(EnvironmentFailure, match="AssertionError: of no use") as caught:
        environments._run([sys.executable, "-c", "assert False, 'of no use'"], tmp_path / "log")
    assert "\n" not in str(caught.value)


def test_environments_pin_every_version() -> None:
    for requirement in environments.REQUIREMENTS.values():
        assert requirement.pinned_torch.endswith("+cpu")
        assert all("==" in package for package in requirement.packages)
    assert environments.interpreter("escaip", Path("nowhere")) == Path(sys.executable)


def test_worker_times_new_positions(worker: Worker) -> None:
    worker.ask("prepare", suite="inference", structures=[COPPER])
    warm = worker.ask("warm_up", least=2, most=3)
    assert 2 <= len(warm["seconds"]) <= 3
    moved = 0.02 * np.random.default_rng(0).normal(size=(1, 3))
    assert warm["answer"]["energy"] == pytest.approx(2.0 * moved.sum())
    assert len(worker.ask("turn", number=1, count=3, lead=1)["seconds"]) == 3
    assert worker.ask("memory")["growth_MiB"] is None or worker.ask("memory")["growth_MiB"] >= 0.0


def test_worker_tells_reasons_in_one_line_and_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerFailure, match=r"^ValueError: no element 0$"):
        worker.ask("prepare", suite="inference", structures=[{**COPPER, "numbers": [0]}])
    worker.ask("prepare", suite="inference", structures=[{**COPPER, "positions": [[np.nan] * 3]}])
    with pytest.raises(WorkerFailure, match="energy is nan"):
        worker.ask("warm_up", least=1, most=1)
    worker.ask("prepare", suite="cost", structures=[COPPER])
    assert worker.ask("turn", number=0, count=1, lead=0)["seconds"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('out of luck', file=sys.stderr); sys.exit(3)", "ended with status 3: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("import time; time.sleep(30)", r"build: no answer in 1 s"),
    ],
)
def test_dead_and_silent_workers_are_told(tmp_path: Path, code: str, expected: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    with (
        Worker(Path(sys.executable), "none", tmp_path / "log", patience=1.0, script=script) as process,
        pytest.raises(WorkerFailure, match=expected),
    ):
        process.ask("build")
    assert not process.is_alive


def test_turns_are_interleaved() -> None:
    journal: list[tuple[str, str]] = []
    pair = [contender("a", 1.0, journal), contender("b", 0.1, journal)]
    rows = measure_case(pair, "inference", "one", [COPPER], repeats=3)
    assert [name for name, do in journal if do == "turn"] == ["a", "b"] * 3
    assert [item.turns for item in rows] == [[1.0, 2.0, 3.0], [pytest.approx(0.1 * (1 + i)) for i in range(3)]]
    assert rows[1].evaluations_per_turn == evaluations_per_turn(0.1) == 3
    assert (rows[0].first, rows[0].growth_MiB, rows[0].parameters) == (3.0, 5.0, 10)


def test_a_dead_process_keeps_its_reason_and_stops_nobody() -> None:
    journal: list[tuple[str, str]] = []
    pair = [contender("a", 1.0, journal, dies_at=1), contender("b", 1.0, journal)]
    first = measure_case(pair, "inference", "one", [COPPER], repeats=3)
    second = measure_case(pair, "inference", "two", [COPPER], repeats=1)
    for item in (first[0], second[0]):
        assert item.turns == []
        assert item.why is not None
        assert "signal 9" in item.why
    assert len(first[1].turns) == 3
    assert len(second[1].turns) == 1


def test_table_has_medians_ratios_and_reasons() -> None:
    rows = [
        row(plan.REFERENCE, [0.010, 0.020, 0.030], first=1.5, growth_MiB=12.0),
        row("slower", [0.020, 0.080, 0.090]),
        row("broken", [], why="RuntimeError: no|way"),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.case_table(rows).splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[2] == [plan.REFERENCE, "1 000", "20.0", "10.0–30.0", "2000", "1.00", "12", "1.50", ""]
    assert lines[3][5] == "3.00"  # median of 2, 4 and 3, not the ratio of the medians
    assert lines[4][-1] == "RuntimeError: no/way"


def test_summary_is_ordered_by_size_and_counts_atoms() -> None:
    rows = [
        row("large", [0.4], 200),
        row("small", [0.1, 0.2, 0.3], 200),
        row("small", [0.9], 200),  # of another group
        row("large", [], 400, "training", why="no training"),
    ]
    for item in rows:
        item.parameters = 2_000_000 if item.variant == "large" else 500_000
    table = report.summary_table(rows, "inference")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[2] == ["small", "0.50 M", "1000"]
    assert lines[3] == ["large", "2.00 M", "2000"]
    assert "—" in report.summary_table(rows, "training").splitlines()[2]


def test_relations_compare_turn_by_turn() -> None:
    relation = plan.Relation("ours", "theirs", same_function=True)
    rows = [
        row("ours", [1.0, 2.0, 4.0], answer={"energy": 2.0}),
        row("theirs", [3.0, 4.0, 20.0], answer={"energy": 2.002}),
    ]
    found = report.relate(rows, relation)
    assert found is not None
    assert found["times"] == pytest.approx(3.0)
    assert found["energies_differ_by"] == pytest.approx(0.002 / 2.002)
    assert "theirs 4000 ms, ours 2000 ms: 3.00×" in report.relation_line(found)
    assert report.relate(rows[:1], relation) is None
    failed = report.relate([rows[0], row("theirs", [], why="no memory")], relation)
    assert failed is not None
    assert report.relation_line(failed).endswith("theirs: no memory")


def test_slopes_are_exponents() -> None:
    sizes = (100, 200, 400, 800)
    rows = [row("square", [1e-6 * atoms**2], atoms, "cost") for atoms in sizes]
    rows += [row("linear", [1e-6 * atoms], atoms, "cost") for atoms in sizes[:2]]
    rows.append(row("linear", [], 400, "cost", why="RuntimeError: out of memory"))
    found = report.slopes(rows)
    assert found["square"]["slope"] == pytest.approx(2.0)
    assert found["square"]["slope_upper_half"] == pytest.approx(2.0)
    assert found["linear"]["slope"] == pytest.approx(1.0)
    assert found["linear"]["largest"] == 200
    assert "2.00" in report.slope_table(found)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (12.34, "12.3"), (0.01234, "0.0123"), (0.0, "0")])
def test_digits(value: float, text: str) -> None:
    assert report.digits(value) == text


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--repeats", "0"], "--repeats is 0: it must be at least 1"),
        (["--cases", "gold"], "there is no 'gold', only aspirin"),
        (["--peers", "gap"], "invalid choice: 'gap'"),
        (["--suite", "cost", "--cases", "aspirin"], "there is no 'aspirin', only 108 Cu"),
    ],
)
def test_command_line_refuses(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit) as caught:
        run.arguments()
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
