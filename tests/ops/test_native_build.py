"""How the C++ kernels are compiled on first use and kept: a tiny source stands in for them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from escaip.errors import ConfigError
from escaip.ops import native
from escaip.ops.native import build
from escaip.ops.problem import Problem

pytestmark = pytest.mark.skipif(native.availability() is not None, reason=f"native {native.availability()}")

TINY = 'extern "C" int answer() { return sizeof(ESCAIP_SCALAR); }\n'


@dataclass
class Workshop:
    """A tiny source in place of the kernels, a cache of its own, and a compiler that keeps a log."""

    folder: Path
    real: list[str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "native"

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir())

    def compilations(self) -> int:
        log = self.folder / "log"
        return log.read_text().count("attention.cpp") if log.exists() else 0

    def compiler(self, before: str = "") -> str:
        """Writes a compiler that runs ``before`` and then the real one."""
        script = self.folder / "cxx"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/log\n{before}\nexec {" ".join(self.real)} "$@"\n')
        script.chmod(0o700)
        return str(script)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    real = build.find_compiler()
    assert real is not None
    made = Workshop(tmp_path, real)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "attention.cpp").write_text(TINY)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "source")
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("CXX", made.compiler())
    monkeypatch.setenv("ESCAIP_CACHE", str(tmp_path / "cache"))
    return made


def load_anew(scalar: str = "float") -> int:
    """What another process would do."""
    build._loaded.clear()
    build._version.cache_clear()
    return int(build.library(scalar).answer())


def test_compiled_once_and_again_when_anything_changes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.availability() is None
    assert workshop.compilations() == 0
    assert load_anew() == load_anew() == 4
    assert build.library("float") is build.library("float")
    assert workshop.compilations() == 1
    assert stat.S_IMODE(workshop.cache.stat().st_mode) == 0o700
    assert load_anew("double") == 8
    assert workshop.compilations() == 2
    (workshop.folder / "source" / "attention.cpp").write_text(TINY.replace("sizeof(ESCAIP_SCALAR)", "77"))
    assert load_anew() == 77
    monkeypatch.setattr(build, "_processor", lambda: "another")
    load_anew()
    monkeypatch.setattr(build, "_FLAGS", tuple(flag.replace("-O3", "-O1") for flag in build._FLAGS))
    load_anew()
    workshop.compiler('[ "$1" = --version ] && echo newer')
    load_anew()
    assert workshop.compilations() == 6
    assert len(workshop.kept) == 6


def test_processes_that_race_both_succeed(workshop: Workshop) -> None:
    """Each waits in the compiler until both are there."""
    wait = f"""case "$*" in *attention.cpp*) touch {workshop.folder}/here.$$; n=0
        until [ $(ls {workshop.folder} | grep -c here) -ge 2 ] || [ $n -ge 100 ]
        do sleep 0.1; n=$((n + 1)); done;; esac"""
    for name in ("here", "log"):
        (workshop.folder / name).unlink(missing_ok=True)
    program = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('build', {str(Path(build.__file__))!r})\n"
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build)\n"
        f"build.SOURCES = pathlib.Path({str(build.SOURCES)!r})\n"
        "sys.exit(build.library('float').answer() != 4)"
    )
    real, root = workshop.compiler(wait), str(Path(build.__file__).parents[3])
    environment = {**os.environ, "CXX": real, "PYTHONPATH": root}
    both = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert workshop.compilations() == 2
    assert len(workshop.kept) == 1


@pytest.mark.bad_input
def test_a_failing_compiler_is_named_and_leaves_nothing(workshop: Workshop) -> None:
    (workshop.folder / "source" / "attention.cpp").write_text("#error this machine is too old\n")
    with pytest.raises(ConfigError, match=r"cxx fails .*this machine is too old.*backend='blocked'") as caught:
        load_anew()
    assert "\n" not in str(caught.value)
    assert workshop.kept == []
    (workshop.folder / "cxx").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ConfigError, match=r"fails \(status 3\)"):
        load_anew()
    (workshop.folder / "cxx").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done; echo junk > "$2"\n'
    )
    with pytest.raises(ConfigError, match=r"does not load .*ESCAIP_CACHE"):
        load_anew()
    assert workshop.kept == []


@pytest.mark.bad_input
def test_no_compiler(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX names 'no-such-compiler', which is not found" in str(build.availability())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(workshop.folder))
    assert "none of c++, g++ and clang++ is found: install g++" in str(native.availability())
    with pytest.raises(ConfigError, match=r"^attention backend 'native' needs a C\+\+ compiler.*backend='blocked'"):
        load_anew()


def test_without_a_place_to_keep_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "file").write_text("")
    monkeypatch.setenv("ESCAIP_CACHE", str(workshop.folder / "file" / "below"))
    assert load_anew() == load_anew() == 4
    assert workshop.compilations() == 2
    monkeypatch.delenv("ESCAIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "shared"))
    assert load_anew() == load_anew() == 4
    assert workshop.compilations() == 3
    assert len(list((workshop.folder / "shared" / "escaip" / "native").iterdir())) == 1


def test_a_damaged_library_is_made_again(workshop: Workshop) -> None:
    load_anew()
    kept = workshop.cache / workshop.kept[0]
    kept.unlink()  # this process has the old one mapped
    kept.write_bytes(b"")
    assert load_anew() == 4
    assert workshop.compilations() == 2


@pytest.mark.bad_input
def test_a_cache_of_someone_else_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.cache.mkdir(parents=True, mode=0o777)
    workshop.cache.chmod(0o777)
    load_anew()
    assert stat.S_IMODE(workshop.cache.stat().st_mode) == 0o700
    if os.getuid() == 0:
        os.chown(workshop.cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user, whose compiled code is not run: set ESCAIP_CACHE"):
        load_anew()


def test_without_openmp_the_library_has_threads_of_its_own(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_loaded_openmp", lambda: None)
    monkeypatch.setattr(build, "SOURCES", Path(build.__file__).parent)
    offsets = torch.arange(0, 70, 10)
    q, k, v = torch.randn(3, 60, 2, 6)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native.forward(Problem(q, k, v, None, None, offsets, offsets, (6,), 0.5)).out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert "-fopenmp" not in (workshop.folder / "log").read_text()
