"""Counts what a newcomer has to read: lines, functions, floors and circles of imports, files that a command enters.

python benchmarks/house.py [--root DIR] [--json FILE]

Floors are the longest chain of imports between modules of the package, circles the groups of modules that import one
another, both with imports inside functions and for typing. ``--root`` counts another checkout with the same script.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx

COMMANDS = {
    "force call": "force_call",
    "escaip md, two steps": "md",
    "escaip fit, two steps": "fit",
}


def tracked(root: Path, *patterns: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=root, capture_output=True, text=True, check=True)
    return [root / name for name in listing.stdout.split() if (root / name).is_file()]


def lines(paths: list[Path]) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def import_graph(root: Path) -> Any:
    """Modules of the package and their imports; of ``from package import module`` the module is meant."""
    modules = {}
    for path in tracked(root, "escaip/*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = networkx.DiGraph()
    graph.add_nodes_from(modules)
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in modules else node.module for one in inner]
            else:
                continue
            # A package's own door names what is inside and is no floor of its own.
            if path.name != "__init__.py":
                graph.add_edges_from((name, target) for target in targets if target in modules and target != name)
    return graph


def static(root: Path) -> dict[str, int]:
    package = tracked(root, "escaip/*.py")
    native = tracked(root, "escaip/*.cpp", "escaip/*.h")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package]
    graph = import_graph(root)
    circles = [group for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    words = sum(len(path.read_text(encoding="utf-8").split()) for path in tracked(root, "docs/*.md", "README.md"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        "files": len(package) + len(native),
        "lines of Python": lines(package),
        "lines of C++": lines(native),
        "lines of tests": lines(tracked(root, "tests/*.py")),
        "lines of benchmarks": lines(tracked(root, "benchmarks/*.py")),
        "words of docs": words,
        "functions": sum(isinstance(node, definitions) for tree in trees for node in ast.walk(tree)),
        "Any": sum(isinstance(node, ast.Name) and node.id == "Any" for tree in trees for node in ast.walk(tree)),
        "floors": networkx.dag_longest_path_length(networkx.condensation(graph)) + 1,
        "circles": len(circles),
    }


def entered(run: Callable[[], Any]) -> dict[str, int]:
    """Files and functions of the package that a call enters, in this thread."""
    seen: set[tuple[str, str]] = set()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and f"{os.sep}escaip{os.sep}" in frame.f_code.co_filename:
            name = frame.f_code.co_filename.rpartition(f"{os.sep}escaip{os.sep}")[2]
            if not frame.f_code.co_name.startswith("<"):
                seen.add((name, frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {"files": len({name for name, _ in seen}), "functions": len(seen)}


def force_call() -> Callable[[], Any]:
    import ase.build

    from escaip import EScAIPCalculator

    atoms = ase.build.molecule("CH3CH2OH")
    atoms.calc = EScAIPCalculator("example:organic")
    atoms.get_forces()
    atoms.rattle(0.01)
    return atoms.get_forces


def md() -> Callable[[], Any]:
    from escaip.cli import main

    command = ["md", "example:organic", "example:ethanol", "--ensemble", "nve", "--steps", "2", "--temperature", "300"]
    return lambda: main([*command, "--quiet"])


def fit() -> Callable[[], Any]:
    from escaip.cli import main

    options = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"]
    return lambda: main(["fit", "--config", "quickstart", *options])


def count_entered(root: Path, name: str) -> dict[str, int]:
    """In a process of its own, which imports the package from ``root``."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        code = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--entered", name]
        done = subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--entered", choices=COMMANDS.values(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.entered:
        with contextlib.redirect_stdout(io.StringIO()):
            found = entered(globals()[args.entered]())
        print(json.dumps(found))
        return
    root = args.root.resolve()
    counts: dict[str, Any] = dict(static(root))
    for title, name in COMMANDS.items():
        counts[title] = "{files} files, {functions} functions".format(**count_entered(root, name))
    for title, value in counts.items():
        print(f"{title:<24}{value}")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
