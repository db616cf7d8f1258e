"""The C++ library is built at first use, kept and shared; a tiny source stands in for the kernels."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from escaip.ops import cpp, harmonics

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))


@dataclass
class Workshop:
    """A tiny source in place of the kernels, a cache of its own, and a compiler that keeps a log."""

    folder: Path
    real: list[str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "native"

    @property
    def kept(self) -> list[Path]:
        return sorted(self.cache.glob("*"))

    def compilations(self) -> int:
        log = self.folder / "log"
        return log.read_text().count("tiny.cpp") if log.exists() else 0

    def compiler(self, before: str = "") -> str:
        """Writes a compiler that runs ``before`` and then the real one."""
        script = self.folder / "cxx"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/log\n{before}\nexec {" ".join(self.real)} "$@"\n')
        script.chmod(0o700)
        return str(script)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop(tmp_path, cpp.find_compiler())
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tiny.cpp").write_text("int answer() { return 1; }\n")
    monkeypatch.setattr(cpp, "_SOURCES", tmp_path / "source")
    monkeypatch.setattr(cpp, "_UNITS", (("tiny", ()),))
    monkeypatch.setenv("CXX", made.compiler())
    monkeypatch.setenv("ESCAIP_CACHE", str(tmp_path / "cache"))
    return made


def load_anew() -> str | None:
    """Loads as another process would."""
    cpp._unavailable.cache_clear()
    cpp._version.cache_clear()
    try:
        return cpp.unavailable()
    finally:
        cpp._unavailable.cache_clear()


def test_compiled_once_and_again_when_anything_changes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_anew() is load_anew() is None
    assert workshop.compilations() == 1
    assert stat.S_IMODE(workshop.cache.stat().st_mode) == 0o700
    (workshop.folder / "source" / "tiny.cpp").write_text("int answer() { return 2; }\n")
    load_anew()
    monkeypatch.setattr(cpp, "_processor", lambda: "another")
    load_anew()
    monkeypatch.setattr(cpp, "_UNITS", (("tiny", ("-O1",)),))
    load_anew()
    workshop.compiler('[ "$1" = --version ] && echo newer')
    load_anew()
    assert workshop.compilations() == len(workshop.kept) == 5


def test_processes_that_race_both_succeed(workshop: Workshop) -> None:
    """Each waits in the compiler until both are there."""
    wait = f"""case "$*" in *tiny.cpp*) touch {workshop.folder}/here.$$; n=0
        until [ $(ls {workshop.folder} | grep -c here) -ge 2 ] || [ $n -ge 300 ]
        do sleep 0.1; n=$((n + 1)); done;; esac"""
    program = (
        "import pathlib, sys\nfrom escaip.ops import cpp\n"
        f"cpp._SOURCES, cpp._UNITS = pathlib.Path({str(cpp._SOURCES)!r}), (('tiny', ()),)\n"
        "sys.exit(cpp.unavailable())"
    )
    environment = {**os.environ, "CXX": workshop.compiler(wait), "PYTHONPATH": str(Path(cpp.__file__).parents[3])}
    both = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert workshop.compilations() == 2
    assert len(workshop.kept) == 1


@pytest.mark.bad_input
def test_a_failing_compiler_is_named_and_leaves_nothing(workshop: Workshop) -> None:
    (workshop.folder / "source" / "tiny.cpp").write_text("#error this machine is too old\n")
    reason = str(load_anew())
    assert "this machine is too old" in reason
    assert "CXX" in reason
    assert "\n" not in reason
    (workshop.folder / "cxx").write_text("#!/bin/sh\n[ $1 = --version ] || exit 3\n")
    assert "status 3" in str(load_anew())
    (workshop.folder / "cxx").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done; echo junk > "$2"\n'
    )
    assert "ESCAIP_CACHE" in str(load_anew())


@pytest.mark.bad_input
def test_without_a_compiler_plain_operations_and_one_line(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX names 'no-such-compiler', which is not found" in str(load_anew())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(workshop.folder / "source"))
    assert "none of c++, g++ and clang++ is found: install g++" in str(load_anew())
    cpp._has_kernels.cache_clear()
    bonds = (torch.eye(3), torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, 2)
    try:
        with pytest.warns(UserWarning, match=r"plain PyTorch replaces the C\+\+ kernels"):
            order = harmonics.bond_orientational_order(*bonds, offsets=torch.tensor([0, 3]))
        assert not cpp.has_kernels()  # and no second warning, which would be an error here
    finally:
        cpp._has_kernels.cache_clear()
        cpp._unavailable.cache_clear()
    torch.testing.assert_close(order, harmonics.bond_orientational_order(*bonds))


def test_without_a_place_to_keep_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "file").write_text("")
    monkeypatch.setenv("ESCAIP_CACHE", str(workshop.folder / "file" / "below"))
    assert load_anew() is load_anew() is None
    assert workshop.compilations() == 2


def test_a_damaged_library_is_made_again(workshop: Workshop) -> None:
    cpp._version.cache_clear()
    workshop.cache.mkdir(parents=True, mode=0o700)
    damaged = workshop.cache / f"{cpp.library_key(cpp.find_compiler())}.so"
    damaged.write_bytes(b"")
    damaged.chmod(0o700)
    assert load_anew() is None
    assert workshop.compilations() == 1
    assert damaged.stat().st_size


@pytest.mark.bad_input
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_planted_library_is_not_loaded(place: str, workshop: Workshop) -> None:
    """Others may write to the file or its folder: code in it could be theirs."""
    cpp._version.cache_clear()
    workshop.cache.mkdir(parents=True, mode=0o700)
    planted = workshop.cache / f"{cpp.library_key(cpp.find_compiler())}.so"
    witness = workshop.folder / "witness"
    source = workshop.folder / "planted.cpp"
    source.write_text(
        f'#include <cstdio>\nstruct Run {{ Run() {{ std::fclose(std::fopen("{witness}", "w")); }} }} run;\n'
    )
    subprocess.run([*workshop.real, "-shared", "-fPIC", str(source), "-o", str(planted)], check=True)
    planted.chmod(0o700)
    (planted if place == "file" else workshop.cache).chmod(0o777)
    reason = str(load_anew())
    assert not witness.exists()
    assert "can be written by other users" in reason


def test_one_openmp_run_time() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    program = (
        "from escaip.ops import cpp\n"
        "assert cpp.has_kernels()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split(maxsplit=5)[-1] for line in lines if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1
