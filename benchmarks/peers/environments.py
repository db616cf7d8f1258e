"""A throw-away virtual environment for each peer, made where it is absent: PyTorch first and pinned, without CUDA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from escaip.errors import EscaipError

STAMP = "peer.json"


class EnvironmentFailure(EscaipError):
    """An environment cannot be made; one line says why."""


@dataclass(frozen=True)
class Requirement:
    """What an environment holds: the newest PyTorch that the peer allows, then the peer itself."""

    packages: tuple[str, ...]
    torch: str = "2.13.0"

    @property
    def pinned_torch(self) -> str:
        return f"torch=={self.torch}+cpu"


REQUIREMENTS: dict[str, Requirement] = {
    "fairchem": Requirement(("fairchem-core==2.24.0",)),
    "mace": Requirement(("mace-torch==0.3.16",)),
    "nequip": Requirement(("nequip==0.19.1",)),
    "orb": Requirement(("orb-models==0.5.5",)),
    "chgnet": Requirement(("chgnet==0.4.2",)),
}
PEERS = ("escaip", *REQUIREMENTS)  # escaip's own runs in the interpreter of the driver


def default_folder() -> Path:
    """In the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "escaip" / "peers"


def interpreter(peer: str, folder: Path, index: str | None = None, requirement: Requirement | None = None) -> Path:
    """Returns the Python of a peer's environment, which is made first where it is absent or of other versions.

    Args:
        peer: one of PEERS, or any name where a requirement is given.
        folder: of the environments.
        index: of a package index with builds of PyTorch for the CPU, beside pip's own.
        requirement: by default that of the peer.

    Raises:
        EnvironmentFailure: it cannot be made, or something else stands in its place.
    """
    if peer == "escaip":
        return Path(sys.executable)
    path = (folder / peer).absolute()
    python = path / "bin" / "python"
    requirement = requirement or REQUIREMENTS[peer]
    wanted = {"torch": requirement.pinned_torch, "packages": list(requirement.packages)}
    found = _read_stamp(path)
    if found == {**wanted, "complete": True} and python.exists():
        return python
    if found is None and path.exists():
        raise EnvironmentFailure(f"{path} was not made by this command: remove it or choose another --environments")
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    _write_stamp(path, {**wanted, "complete": False})
    _make(path, requirement, index)
    _write_stamp(path, {**wanted, "complete": True})
    return python


def _make(path: Path, requirement: Requirement, index: str | None) -> None:
    python = str(path / "bin" / "python")
    constraint = path / "constraint.txt"
    log = path.with_name(f"{path.name}.log")
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(path)], log)
    constraint.write_text(f"{requirement.pinned_torch}\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    extra = ["--extra-index-url", index] if index else []
    try:
        _run([*pip, *extra, requirement.pinned_torch], log)
    except EnvironmentFailure as error:
        raise EnvironmentFailure(f"{error}; --torch-index names an index with builds for the CPU") from error
    _run([*pip, *extra, "-c", str(constraint), *requirement.packages], log)
    _run([python, "-c", "import torch; assert torch.version.cuda is None, 'PyTorch is a build for CUDA'"], log)


def _run(command: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        start = stream.tell()
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise EnvironmentFailure(f"{failure_line(log.read_text(encoding='utf-8', errors='replace')[start:])} ({log})")


def failure_line(output: str) -> str:
    """The first error that pip tells, or the last line of what was printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or ["it ended without a word"])[0][:240]


def _read_stamp(path: Path) -> dict[str, object] | None:
    try:
        content: dict[str, object] = json.loads((path / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _write_stamp(path: Path, content: dict[str, object]) -> None:
    aside = path / f".{STAMP}.part"
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(aside, path / STAMP)
