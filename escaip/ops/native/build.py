"""Compiles the C++ of this folder with the system's compiler on first use, and keeps the result in a per-user cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from escaip.errors import ConfigError

# What the kernels are compiled for.
SCALARS = {torch.float32: "float", torch.float64: "double"}
SOURCES = Path(__file__).resolve().parent
_REMEDY = "install g++ or clang++, name one in CXX, or use backend='blocked'"
# Of the arithmetic no more is asked than fused multiply-adds and no errno: infinities must stay.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# Of one source: the graph decides what two distances are equal, so they are rounded as PyTorch rounds them.
_OF_SOURCE = {"graph": ("-ffp-contract=off",)}
# Of each kind the first that the compiler takes.
_OPTIONAL = (("-march=native", "-mcpu=native"), ("-pthread",), ("-Wno-psabi",))
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


def availability() -> str | None:
    """Why the backend cannot be used here, in one line; None where there is a compiler. Compiles nothing."""
    if find_compiler() is not None:
        return None
    chosen = os.environ.get("CXX", "").strip()
    missing = f"CXX names {chosen!r}, which is not found" if chosen else "none of c++, g++ and clang++ is found"
    return f"needs a C++ compiler, and {missing}: {_REMEDY}"


def find_compiler() -> list[str] | None:
    """The command of the compiler: ``$CXX`` if set, else the first of c++, g++ and clang++ that is there."""
    chosen = os.environ.get("CXX", "").split()
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    return None


def library(scalar: str, kernels: str = "attention") -> ctypes.CDLL:
    """The compiled kernels of one source for ``"float"`` or ``"double"``, from memory, the cache, or compiled now.

    Args:
        scalar: their type.
        kernels: name of the source: ``"attention"``, ``"spline"``, ``"orientation"``, ``"operators"``, or ``"graph"``
            (double only).

    Raises:
        ConfigError: no compiler, or it fails, or the cache belongs to another user.
    """
    with _lock:
        name = f"{kernels}-{scalar}"
        if name not in _loaded:
            _loaded[name] = _load(scalar, kernels)
        return _loaded[name]


def is_kept(scalar: str, kernels: str) -> bool:
    """Whether :func:`library` would find the kernels in memory or in the cache."""
    compiler = find_compiler()
    if f"{kernels}-{scalar}" in _loaded or compiler is None:
        return compiler is not None
    folder = cache_folder("native")
    return folder is not None and (folder / f"{kernels}-{scalar}-{_key(compiler)}.so").is_file()


@functools.cache
def compiled(scalar: str, kernels: str) -> bool:
    """Whether this machine compiles kernels that plain operations can replace; warns once where a compiler fails."""
    if availability() is not None:
        return False
    try:
        library(scalar, kernels)
    except ConfigError as error:
        warnings.warn(f"the {kernels} kernels are replaced by plain operations, which is slower: {error}", stacklevel=2)
        return False
    return True


def _load(scalar: str, kernels: str) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError(f"attention backend 'native' {availability()}")
    name = f"{kernels}-{scalar}-{_key(compiler)}.so"
    folder = cache_folder("native")
    if folder is not None and (folder / name).is_file():
        with contextlib.suppress(OSError):  # damaged (a full disk, a copied home folder): compiled again
            return ctypes.CDLL(str(folder / name))
    if folder is not None and os.access(folder, os.W_OK | os.X_OK):
        return _compile(compiler, scalar, kernels, folder / name)
    # Nowhere to keep it: compiled for this process alone. A loaded library stays mapped after its file is gone.
    with tempfile.TemporaryDirectory(prefix="escaip-") as private:
        return _compile(compiler, scalar, kernels, Path(private) / name)


def _compile(compiler: list[str], scalar: str, kernels: str, path: Path) -> ctypes.CDLL:
    """Writes aside, then renames: processes that race each put a whole file there."""
    handle, aside = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        source = str(SOURCES / f"{kernels}.cpp")
        flags = [*_FLAGS, *_OF_SOURCE.get(kernels, ()), *_accepted(tuple(compiler)), f"-DESCAIP_SCALAR={scalar}"]
        done = _run([*compiler, *flags, source, *_openmp(compiler), *_linked(kernels), "-o", aside])
        what = f"attention backend 'native': {' '.join(compiler)}"
        if done.returncode != 0:
            raise ConfigError(f"{what} fails ({_last_line(done)}): {_REMEDY}")
        os.chmod(aside, 0o700)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())  # a power failure must not leave an empty file behind a good name
        try:
            loaded = ctypes.CDLL(aside)
        except OSError as error:
            raise ConfigError(
                f"{what} made a library that does not load ({error}): set ESCAIP_CACHE to a folder from which "
                "libraries may be loaded, or use backend='blocked'"
            ) from error
        os.replace(aside, path)
        return loaded
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def cache_folder(name: str) -> Path | None:
    """The user's folder that keeps compiled code; None where it neither exists nor can be made.

    Args:
        name: of the folder within the cache: ``"native"`` for kernels, ``"compiled"`` for whole evaluations.

    Raises:
        ConfigError: others own it or may write to it, so that what lies there must not be run.
    """
    root = os.environ.get("ESCAIP_CACHE")
    if not root:
        shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(shared, "escaip")
    folder = Path(root) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid == os.getuid() and status.st_mode & 0o022:
        folder.chmod(0o700)
    elif status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise ConfigError(
            f"{folder} belongs to another user, whose compiled code is not run: set ESCAIP_CACHE to a folder of yours"
        )
    return folder


def _key(compiler: list[str]) -> str:
    """Names what the library depends on: sources, compiler, flags, OpenMP run time and processor."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    parts = [*compiler, os.path.realpath(compiler[0]), _version(tuple(compiler)), *_FLAGS, str(_OPTIONAL)]
    parts += [str(_OF_SOURCE), *_openmp(compiler), torch.__version__, sys.platform, platform.machine(), _processor()]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets: home folders are shared by unlike machines, and a library fits one kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@functools.cache
def _accepted(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """Of the optional flags, the first of each kind with which the compiler links an empty library."""
    accepted: list[str] = []
    with tempfile.TemporaryDirectory(prefix="escaip-") as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int escaip_empty() { return 0; }\n", encoding="utf-8")
        for kind in _OPTIONAL:
            for flag in kind:
                command = [*compiler, "-Werror", "-shared", "-fPIC", *accepted, flag, str(source), "-o", f"{source}.so"]
                if _run(command).returncode == 0:
                    accepted.append(flag)
                    break
    return tuple(accepted)


@functools.cache
def _loaded_openmp() -> str | None:
    """The GNU OpenMP run time that PyTorch has loaded; other packages may have loaded one of their own."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libgomp" in line}
    own = str(Path(torch.__file__).resolve().parent)
    return min(found, key=lambda path: (not path.startswith(own), path), default=None)


def _openmp(compiler: list[str]) -> list[str]:
    """Flags that share PyTorch's threads; without them the library starts threads of its own at each call.

    A second run time beside PyTorch's would keep a second set of threads, spinning while they wait for work. So OpenMP
    is used only where PyTorch has loaded GNU's, by a compiler that calls that, linked to the very same file.
    """
    run_time = _loaded_openmp()
    if run_time is None or "clang" in _version(tuple(compiler)):
        return []
    return ["-fopenmp", "-Wl,--as-needed", run_time]


def _linked(kernels: str) -> list[str]:
    """What a source is linked with besides the system's libraries."""
    if kernels != "operators":
        return []
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return [str(Path(torch.__file__).parent / "lib" / name)]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"status {done.returncode}"])[-1].strip()
