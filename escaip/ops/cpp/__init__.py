"""C++ kernels for the CPU behind PyTorch's dispatcher, compiled by the system's compiler at first use.

The library is kept in a private folder of the user's cache and loaded from there. Operators that have a form in plain
PyTorch use that where the library is missing; the attention backend ``native`` needs it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from escaip.errors import ConfigError
from escaip.files import cache_folder, check_private, first_line, write_aside

_SOURCES = Path(__file__).resolve().parent
_REMEDY = "install g++ or clang++, or name one in CXX"
# Fused multiply-adds are allowed and errno is not set, but infinities stay.
_FLAGS = (
    "-std=c++20", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
)  # fmt: skip
_OPTIMISED = ("-O3", "-ffp-contract=fast")
# Object files. The graph decides which distances are equal, so it rounds as PyTorch does.
_UNITS = (
    ("attention", (*_OPTIMISED, "-DESCAIP_SCALAR=float")),
    ("attention", (*_OPTIMISED, "-DESCAIP_SCALAR=double")),
    ("binding", ("-O1",)),
    ("graph", ("-O3", "-ffp-contract=off")),
    ("harmonics", _OPTIMISED),
    ("layers", _OPTIMISED),
    ("layer_binding", ("-O1",)),
    ("spline", _OPTIMISED),
)
_lock = threading.Lock()


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether the kernels are loaded, compiling them at the first call; warns once where they cannot be."""
    return _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    reason = unavailable()
    if reason is not None:
        warnings.warn(f"plain PyTorch replaces the C++ kernels, which is slower: {reason}", stacklevel=3)
    return reason is None


def unavailable() -> str | None:
    """Loads the kernels, compiling them where needed; returns why they cannot be loaded, in one line, or None."""
    with _lock:
        return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    try:
        _load()
    except (ConfigError, OSError) as error:
        return first_line(error)
    return None


def find_compiler() -> list[str]:
    """The command of the compiler: ``$CXX`` if set, else the first of c++, g++ and clang++ that exists.

    Raises:
        ConfigError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    missing = f"CXX names {chosen[0]!r}, which is not found" if chosen else "none of c++, g++ and clang++ is found"
    raise ConfigError(f"needs a C++ compiler, and {missing}: {_REMEDY}")


def _load() -> None:
    compiler = find_compiler()
    name = f"{library_key(compiler)}.so"
    folder = cache_folder("native")
    if folder is not None and (folder / name).exists():
        check_private(folder / name)
        with contextlib.suppress(OSError):  # damaged, by a full disk for instance: compiled again
            torch.ops.load_library(folder / name)
            return
    with contextlib.ExitStack() as stack:
        if folder is None or not os.access(folder, os.W_OK | os.X_OK):
            # For this process alone: a loaded library stays mapped after its file is gone.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="escaip-")))
        with write_aside(folder / name, ConfigError) as aside:
            _compile(compiler, aside)
        try:
            torch.ops.load_library(folder / name)
        except OSError as error:
            remedy = "set ESCAIP_CACHE to a folder from which libraries may be loaded"
            raise ConfigError(f"{folder / name} does not load ({first_line(error)}): {remedy}") from error


def _compile(compiler: list[str], library: Path) -> None:
    headers = [f"-I{Path(torch.__file__).parent / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    openmp = _openmp(compiler)
    with tempfile.TemporaryDirectory(prefix="escaip-") as scratch:
        objects = [f"{scratch}/{index}.o" for index in range(len(_UNITS))]
        commands = [
            [*compiler, *_FLAGS, *flags, *openmp[:1], *headers, "-c", str(_SOURCES / f"{source}.cpp"), "-o", made]
            for (source, flags), made in zip(_UNITS, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        libraries = Path(torch.__file__).parent / "lib"
        _run([
            *compiler, "-shared", "-pthread", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10", *openmp, "-o",
            str(library),
        ])  # fmt: skip


def _openmp(compiler: list[str]) -> list[str]:
    """Flags by which the kernels share PyTorch's threads; without them they run on one thread.

    A second OpenMP run time would keep a second set of threads, spinning while they wait. So OpenMP is used only where
    PyTorch has loaded GNU's, by a compiler that calls that, linked to the very same file.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libgomp" in line}
    own = str(Path(torch.__file__).resolve().parent)
    if not found or "clang" in _version(tuple(compiler)):
        return []
    return ["-fopenmp", "-Wl,--as-needed", min(found, key=lambda path: (not path.startswith(own), path))]


def library_key(compiler: list[str]) -> str:
    """Name of the library: a digest of sources, compiler, flags, OpenMP run time, PyTorch and processor."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    parts = (compiler, _version(tuple(compiler)), _FLAGS, _UNITS, _openmp(compiler), torch.__version__, _processor())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets: machines that differ may share a home folder, and a library fits one kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _run(command: list[str]) -> str:
    """Output of a compiler; raises ConfigError with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ConfigError(f"the C++ compiler {command[0]} does not run ({error.strerror}): {_REMEDY}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        first = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
        raise ConfigError(f"the C++ compiler {command[0]} fails ({first}): {_REMEDY}")
    return done.stdout
