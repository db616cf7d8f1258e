"""Every command and every block of Python in the documentation runs, in a reduced form where it takes long.

A block of ``bash`` or ``python`` is executed as it stands, one after the other, in one folder and one name space.
``REDUCED`` shortens long commands. ``<!-- skip: REASON -->`` before a block leaves it out, for one of ``REASONS``.
Notebooks of the gallery are pages as well, whose cells are blocks; ``CONSTANTS`` replaces those of the cell that is
tagged ``parameters``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import matplotlib.pyplot as plt
import pytest

from escaip.cli import main, parser_of
from escaip.data import open_source
from escaip.data.readers import READERS
from escaip.distil.plan import DistilPlan
from escaip.files import resolve
from escaip.models import MODELS
from escaip.nn.heads import HEADS
from escaip.train.losses import KINDS
from escaip.types import TARGETS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("gallery/*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *NOTEBOOKS]
CONSTANTS: dict[str, dict[str, object]] = {
    "train": {"STEPS": 10},
    "simulate": {"STEPS": 20},
    "properties": {"SUPERCELL": [1, 1, 1]},
}
REASONS = {"network", "GPU", "cluster", "published files", "shell", "installation", "checkpoint of fairchem-core"}
FIT = (
    "--trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1 --trainer.limit_train_batches 1 "
    "--trainer.limit_val_batches 1 --trainer.limit_test_batches 1 --data.max_atoms 40 "
    "--trainer.enable_progress_bar false"
)
REDUCED = {
    "fit": FIT,
    "check example:organic": "--structure structures.xyz --frame 0",
    "check runs/quickstart/latest/best.ckpt": "--structure structures.xyz --frame 0",
    "md": "--steps 4 --interval 2 --quiet",
    "relax": "--fmax 1.0",
    "eos": "--relax none --points 5 --span 0.02",
    "elastic": "--relax none",
    "phonons": "--relax none --supercell 1 1 1 --mesh 10",
    "vibrations": "--fmax 0.05",
    "neb": "--fmax 50 --images 1 --relax none",
    "scaling fit": "--bootstrap 50",
    "scaling plot": "--bootstrap 50",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Line, or number of the cell, language and text of each block that is executed."""
    if path.suffix == ".ipynb":
        found = []
        for number, cell in enumerate(code_cells(path), start=1):
            text = "".join(cell["source"])
            is_bash = text.startswith("%%bash\n")
            if "parameters" in cell["metadata"].get("tags", ()):
                text += "".join(f"\n{name} = {value!r}" for name, value in CONSTANTS[path.stem].items())
            found.append((number, "bash" if is_bash else "python", text.removeprefix("%%bash\n")))
        return found
    text = path.read_text(encoding="utf-8")
    pattern = r"^( *)(?:<!-- skip: ([^>]*?) -->\n\n?\1)?```(\w*)[^\n]*\n(.*?)^\1```$"
    found = []
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        indent, reason, language, content = match.groups()
        if reason is not None:
            assert reason in REASONS, f"{path}: {reason!r} is no reason to leave a block out"
        elif language in ("bash", "python"):
            line = text[: match.start(4)].count("\n") + 1
            found.append((line, language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)))
    return found


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: labelled frames, a structure, a model and a training run."""
    folder = tmp_path_factory.mktemp("workspace")
    frames = [structure.to_ase() for structure in open_source(resolve("dataset:spice/sample.hdf5"), limit=60)]
    ase.io.write(folder / "train.extxyz", frames[:48])
    ase.io.write(folder / "test.extxyz", frames[48:])
    ase.io.write(folder / "structures.xyz", [ase.build.molecule(name) for name in ("H2O", "CH4", "C6H6")])
    shutil.copy(resolve("example:ethanol"), folder / "start.xyz")
    umbrella = ase.build.molecule("NH3")
    ase.io.write(folder / "before.xyz", umbrella)
    umbrella.positions[:, 2] *= -1.0
    ase.io.write(folder / "after.xyz", umbrella)
    shutil.copy(resolve("example:organic"), folder / "model.escaip")
    ase.io.write(folder / "copper.xyz", ase.build.bulk("Cu", cubic=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split(f"fit --config quickstart {FIT}")) == 0
    return folder


def run(command: str) -> int:
    """Runs one command line of a page in this process."""
    words = shlex.split(command.partition(" > ")[0], comments=True)
    assert words[0] == "escaip", f"not run by this test: {command}"
    if words[1:3] == ["scaling", "run"]:  # minutes: a recorded study takes its place, tests/scaling runs one
        parser_of("scaling run").parse_args(words[3:])
        shutil.copytree(ROOT / "benchmarks" / "results" / "scaling", words[words.index("--out") + 1])
        return 0
    if words[1] == "distil":  # minutes: tests/distil runs one
        DistilPlan.read(parser_of("distil").parse_args(words[2:]).config)
        return 0
    name = next((n for n in REDUCED if words[1 : 1 + len(n.split())] == n.split()), "")
    extra = shlex.split(REDUCED.get(name, ""))
    if "--help" in words or "--print_config" in words:
        extra = []
    if "--resume" in words or "--ckpt_path" in words:
        extra = [{"4": "8", "1": "2"}.get(word, word) if before in ("--steps", "--trainer.max_epochs") else word
                 for before, word in zip(["", *extra], extra, strict=False)]  # fmt: skip
    if name == "md" and "--resume" not in words:
        extra.append("--overwrite")
    return main([*words[1:], *extra])


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Pages register targets, heads, models, losses and readers, and draw; the next page finds things as they were."""
    tables: list[dict[str, Any]] = [TARGETS, HEADS, MODELS, KINDS, READERS]
    before = [dict(table) for table in tables]
    yield
    plt.close("all")
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = blocks(page)
    if not todo:
        pytest.skip("no commands on this page")
    shutil.copytree(workspace, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    names: dict[str, object] = {"__name__": "__main__"}
    for line, language, content in todo:
        if language == "python":
            exec(compile(content, f"{page}:{line}", "exec"), names)
            continue
        for command in re.sub(r"\\\n", " ", content).splitlines():
            if command.strip() and not command.lstrip().startswith("#"):
                assert run(command) == 0, f"{page}:{line}: {command}"


def test_a_block_is_found_and_a_reason_is_needed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nescaip recipes\n```\n<!-- skip: network -->\n```bash\nescaip data download x\n```\n")
    assert [content for _, _, content in blocks(page)] == ["escaip recipes\n"]
    page.write_text("<!-- skip: laziness -->\n```bash\nescaip recipes\n```\n")
    with pytest.raises(AssertionError, match="laziness"):
        blocks(page)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_printed(notebook: Path) -> None:
    """It was executed from top to bottom, without an error, a warning or a path of the machine: ``make gallery``."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    texts = [
        output.get("text") or [*output["data"].get("text/html", ()), *output["data"]["text/plain"]]
        for output in outputs
    ]
    for line in "".join("".join(text) for text in texts).splitlines():
        assert not re.search(r"(?<![\w<./])/\w+/\w|[Ww]arning", line), line
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["metadata"]["language_info"] == {"name": "python"}
    assert all(set(cell["metadata"]) <= {"tags"} for cell in content["cells"])


def test_the_gallery_is_small() -> None:
    assert 0 < sum(path.stat().st_size for path in NOTEBOOKS) < 600_000
