"""What holds for the tree as a whole: light imports, sizes, safety, links, recipes and cards."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import escaip
from escaip import files
from escaip.cli import main
from escaip.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "escaip"
FOLDERS = ("escaip", "tests", "configs", "datasets", "md", "benchmarks", "docs", ".ci", ".github", "recipe")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".csv", ".xyz", ".extxyz", ".cif", ".sh", ""}
MAX_FILE, MAX_FUNCTION = 600, 60


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_resources" not in path.parts)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def in_fresh_interpreter(code: str) -> dict[str, object]:
    """What ``code`` puts into ``result``, from an interpreter that has imported nothing yet."""
    program = f"import json\nresult = {{}}\n{code}\nprint(json.dumps(result))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_and_its_help_is_light() -> None:
    found = in_fresh_interpreter(
        "import sys, escaip, escaip.cli, escaip.data, escaip.files\n"
        "escaip.cli.main(['--help']); escaip.cli.main(['md', '--help'])\n"
        "heavy = ('torch', 'numpy', 'ase', 'lightning', 'matplotlib', 'h5py', 'pymatgen', 'torch_geometric')\n"
        "result['heavy'] = [name for name in heavy if name in sys.modules]"
    )
    assert found["heavy"] == []


@pytest.mark.slow
def test_imports_touch_no_global_state() -> None:
    names = [name_of(path) for path in modules() if path.name != "__main__.py"]
    found = in_fresh_interpreter(
        "import importlib, logging, os, random, warnings\n"
        "import torch, lightning.pytorch, torch_geometric, ase, pymatgen.core, matplotlib, h5py, numpy\n"
        "def state():\n"
        "    return repr((torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),\n"
        "        torch.is_grad_enabled(), torch.initial_seed(), torch.are_deterministic_algorithms_enabled(),\n"
        "        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, logging.root.handlers,\n"
        "        logging.root.level, matplotlib.get_backend(auto_select=False), os.getcwd(), dict(os.environ),\n"
        "        numpy.geterr(), numpy.random.get_state()[1].tolist(), random.getstate()))\n"
        "before = state()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "result['same'] = state() == before"
    )
    assert found["same"]


def public_modules() -> list[str]:
    packages = (name_of(path.parent / "__init__.py") for path in PACKAGE.glob("*/__init__.py"))
    return ["escaip", *sorted(name for name in packages if "_resources" not in name)]


@pytest.mark.parametrize("name", public_modules())
def test_public_names_resolve(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_names_that_the_interface_fixes() -> None:
    fixed = {
        "escaip": ["EScAIP", "EScAIPConfig", "Potential", "EScAIPCalculator", "load_potential"],
        "escaip.data": ["AtomicData", "collate"],
        "escaip.ops": ["neighborhood_attention", "available_backends"],
        "escaip.graph": ["neighbor_list", "build_graph"],
        "escaip.testing": ["check_potential"],
    }
    for module, names in fixed.items():
        for name in names:
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"


def test_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"escaip {escaip.__version__}"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", escaip.__version__)


@pytest.mark.parametrize("command", ["", "data", "data inspect", "evaluate", "relax", "md", "export", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: escaip {command}".rstrip())
    if not command:
        for name in ("fit", "validate", "test", "predict", "data list", "evaluate", "relax", "md", "info"):
            assert f"\n  {name} " in printed


def unsafe_calls(tree: ast.Module) -> list[str]:
    """Calls that can run code from a file or a string."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = name.split(".")[-1]
        if (
            re.fullmatch(r"(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\.(load|loads|open|Unpickler)", name)
            or name in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (last == "load_from_checkpoint" and options.get("weights_only") != "True")
            or options.get("allow_pickle", "False") != "False"
            or options.get("shell", "False") != "False"
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_read_is_run(path: Path) -> None:
    tree = parse(path)
    assert unsafe_calls(tree) == []
    for node in ast.walk(tree):  # "from pickle import load" would escape the check of calls
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "dill", "cloudpickle"}:
            assert {alias.name for alias in node.names} <= {"UnpicklingError"}


def test_the_only_unpickler_has_an_allow_list() -> None:
    """Pickles are read by one class, which imports nothing: every name is looked up in its list."""
    classes = {
        f"{name_of(path)}.{node.name}": node
        for path in modules()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases)
    }
    assert list(classes) == ["escaip.data.readers.pickled.DataUnpickler"]
    (found,) = (
        node
        for node in ast.walk(classes["escaip.data.readers.pickled.DataUnpickler"])
        if isinstance(node, ast.FunctionDef) and node.name == "find_class"
    )
    assert {ast.unparse(node.value) for node in ast.walk(found) if isinstance(node, ast.Return) and node.value} == {
        "self._allowed[full]"
    }


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(x)", "np.load(p, allow_pickle=True)",
        "pickle.Unpickler(f)", "yaml.load(f)", "eval(text)", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_an_unsafe_call_is_seen(code: str) -> None:
    assert unsafe_calls(ast.parse(code)) != []
    assert unsafe_calls(ast.parse("torch.load(path, map_location='cpu', weights_only=True)")) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_fit_on_screens(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
            assert lines < MAX_FUNCTION, f"{node.name} has {lines} lines without its docstring"


def tracked_text() -> Iterator[Path]:
    """Text files of the tree; those that git would ignore (caches, runs) lie elsewhere."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path
    yield from (
        path for path in sorted(ROOT.iterdir()) if path.is_file() and path.suffix in TEXT and path.name != ".git"
    )


def test_no_machine_paths() -> None:
    machine = re.compile(r"(?<![\w.}])/" + r"(?:work|tmp|root|home|Users)/\w")
    assert machine.search('open("/' + 'tmp/x")')
    found = []
    for path in tracked_text():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []


def test_links_of_the_documents_lead_somewhere() -> None:
    broken = []
    documents = [path for path in tracked_text() if path.suffix == ".md"]
    assert len(documents) > 5
    for path in documents:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.split("#")[0]).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert broken == []


def test_every_page_of_the_documentation_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"- {page}" not in site] == []


def test_shipped_and_declared() -> None:
    assert (PACKAGE / "py.typed").is_file()
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "escaip contributors" in licence
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in pins if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    # Without hosts, file paths or local versions, which other machines do not have.
    unusual = [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) '3\.11')?", pin)]
    assert unusual == []


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
@pytest.mark.parametrize(
    ("find", "names", "error", "message"),
    [
        (files.config_path, ["nothing", "nothing.yaml", "sub/quickstart", ""], ConfigError,
         r"neither a file nor a recipe: recipes are .*quickstart"),
        (files.dataset_card, ["nothing", "", "..", "../datasets/spice"], ConfigError,
         r"has no card: there are .*spice"),
        (files.resolve, [f"dataset:spice/{x}" for x in ("nothing.hdf5", "", "../README.md")], DataError,
         r"does not exist: the card of spice holds .*sample\.hdf5"),
    ],
)  # fmt: skip
def test_names_of_what_is_not_there(find: Any, names: list[str], error: type[Exception], message: str) -> None:
    for name in names:
        with pytest.raises(error, match=message):
            find(name)


@pytest.mark.bad_input
def test_damaged_manifest(installed: Path) -> None:
    make_card(installed / "_resources" / "datasets" / "toys", "[dataset\n")
    with pytest.raises(DataError, match=r"manifest\.toml is no valid TOML"):
        files.dataset_card("toys")
