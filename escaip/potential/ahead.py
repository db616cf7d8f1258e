"""Evaluation compiled ahead of time (docs/performance.md): machine code without weights, given them when loaded.

Code depends on the configuration of a model, on torch and on the machine, but not on weights: what was compiled once is
kept in the user's cache and serves every model of that configuration, from the next process on without compiling.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip import __version__
from escaip.errors import CheckpointError, ConfigError
from escaip.models import Model, settings_of
from escaip.nn.embedding import kept_tables
from escaip.ops.native.build import SCALARS, availability, cache_folder
from escaip.ops.native.operators import register_operators
from escaip.potential.compile import check_distinct, compile_example, flat_evaluation, quiet_compiler, run_padded, trace
from escaip.potential.derivatives import EvaluationInputs
from escaip.types import ModelOutput

INFO = "escaip.json"
_OPTIONS = {
    "aot_inductor.compile_wrapper_opt_level": "O0",  # of what calls the kernels: half the compile time, no slower
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # the smallest weights would become numbers in the code
    "cpp.dynamic_threads": True,  # as many as the process has that loads it
}
_OF_NEWER = ("aot_inductor.enable_line_tables",)
_TRIED = (2, 13)  # torch from which on this was seen to work
_MOST_KEPT = 32  # files in the cache, some MiB each
# Instruction sets in /proc/cpuinfo, among other features that compilers do not use.
_INSTRUCTIONS = re.compile(r"(avx|sse|ssse|fma|f16c|bmi|amx|vaes|vpclmul|gfni|adx|abm|movbe|popcnt)\w*|pni")


def serves(device: torch.device) -> bool:
    """Whether predictions on a device are compiled ahead of time; otherwise they are compiled where they are used."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return device.type == "cpu" and version >= _TRIED and availability() is None


def constants_of(model: Model) -> dict[str, Tensor]:
    """Weights and spline tables by name: what constants of the code may be."""
    tables = {f"tables.{index}": table for index, table in enumerate(kept_tables(model))}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **tables}


def environment(model: Model) -> dict[str, Any]:
    """What code is compiled for."""
    weight = next(model.parameters())
    device = weight.device.type
    return {
        "escaip": __version__,
        "torch": torch.__version__,
        "platform": sys.platform,
        "machine": platform.machine(),
        "instructions": instructions(),
        "device": device,
        "capability": list(torch.cuda.get_device_capability(weight.device)) if device == "cuda" else None,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


@functools.cache
def instructions() -> list[str]:
    """Instruction sets of this processor that compilers use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    words: set[str] = set()
    for line in text.splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "Features":  # ARM: instruction sets only
            words.update(values.split())
        elif name.strip() == "flags":
            words.update(word for word in values.split() if _INSTRUCTIONS.fullmatch(word))
    return sorted(words)


def compile_code(model: Model, differentiate: bool, path: Path) -> tuple[dict[str, str], bool]:
    """Writes the code of :func:`~escaip.potential.derivatives.energy_and_gradient` in the precision set around.

    Returns:
        The weight that each constant of the code is, and whether the code calls our C++.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    model = _stand_in(model)
    settings, weight = model.config.graph, next(model.parameters())
    tables = kept_tables(model)

    def function(*tensors: Tensor) -> list[Tensor]:
        return flat_evaluation(model, tables, tensors, differentiate, False)

    example = compile_example(settings, weight.dtype, weight.device)
    check_distinct(example)
    inputs = tuple(example.flat())
    sizes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    problem = availability() if weight.device.type == "cpu" else None
    if problem is not None:
        raise ConfigError(f"compiling {problem.split(':')[0]}: install g++ or clang++, or name one in CXX")
    try:
        with quiet_compiler():
            graph = trace(function, list(inputs), False)
            exported = torch.export.export(graph, inputs, dynamic_shapes=sizes, strict=False)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=_options())
    except RuntimeError as error:  # Inductor's errors, and the C++ compiler's, are such
        raise ConfigError(f"the evaluation does not compile ({first_line(error)}): evaluate it uncompiled") from error
    known = {id(tensor): name for name, tensor in constants_of(model).items()}
    found = {node.target: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    native = any("native" in node.args or "escaip.orientation" in str(node.target) for node in calls)
    return {name: known[id(tensor)] for name, tensor in found.items()}, native


def _options() -> dict[str, Any]:
    """Those there are in this torch; what is new in 2.13 concerns the time of compiling."""
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in _OPTIONS.items() if name in known or name not in _OF_NEWER}


def _stand_in(model: Model) -> Model:
    """A copy with other weights: of zeros, ones or equal tensors a compiler would make constants of the code."""
    model = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


class CodeEvaluation:
    """Code from a file, with the weights of a model.

    Args:
        path: of the file.
        model: whose weights it gets; they may change in place or be replaced by others of their kind.
        constants: the weight that each constant of the code is.

    Raises:
        CheckpointError: the code cannot be loaded, or does not give what the weights give.
    """

    compiles = True  # operators in C++ that the user's cache does not have

    def __init__(self, path: Path, model: Model, constants: dict[str, str]) -> None:
        self.path = path
        self._constants = constants
        self._config = model.config
        weight = next(model.parameters())
        self._dtype, self._device = weight.dtype, weight.device
        self._state: list[tuple[int, int]] = []
        self._state_of = WeightState()
        index = -1 if self._device.index is None else self._device.index
        if self._device.type == "cpu" and self._dtype in SCALARS:
            register_operators(SCALARS[self._dtype], self.compiles)
        try:
            self._code = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
            self._give(model)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"the code in {path} cannot be used ({first_line(error)}): export it again from its .escaip file"
            ) from error

    def fits(self, model: Model) -> bool:
        """Whether the weights are of the dtype, and on the device, of the code."""
        weight = next(model.parameters())
        return (weight.dtype, weight.device) == (self._dtype, self._device)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """As :func:`escaip.potential.derivatives.energy_and_gradient`."""
        self._give(model)
        return run_padded(self._run, inputs, self._config)

    def check(self, model: Model, differentiate: bool, tolerance: float) -> None:
        """Compares with the weights on one structure: whatever the code depends on is still as it was.

        Raises:
            CheckpointError: it is not.
        """
        settings, weight = model.config.graph, next(model.parameters())
        tensors = compile_example(settings, weight.dtype, weight.device).flat()
        expected = flat_evaluation(model, kept_tables(model), tensors, differentiate, False)
        for found, right in zip(self._run(tensors), expected, strict=True):
            if not bool((found - right).abs().max() <= tolerance * (right.abs().max() + 1e-3)):
                raise CheckpointError(
                    f"the code in {self.path} does not give what its weights give: export it from its .escaip file"
                )

    def _give(self, model: Model) -> None:
        """Hands over weights and tables, where they are others than before."""
        state = self._state_of(model)
        if state != self._state:
            self._held = constants_of(model)  # for as long as the code points to them
            needed = {name: self._held[self._constants[name]].detach() for name in self._code.get_constant_fqns()}
            self._code.load_constants(needed, False, True, True)
            self._state = state

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        # Our operators are called from the code; what PyTorch puts before them for gradients takes as long as they do.
        with torch._C._AutoDispatchBelowAutograd():
            return list(self._code.run(tensors))


class WeightState:
    """Addresses and versions of a model's weights, which change when one is replaced or changed in place.

    Asked for at every evaluation, so that where the weights are is looked up once.
    """

    def __init__(self) -> None:
        self._of: Model | None = None
        self._places: list[tuple[dict[str, Any], str]] = []

    def __call__(self, model: Model) -> list[tuple[int, int]]:
        if self._of is not model:
            self._of = model
            self._places = [(m._parameters, name) for m in model.modules() for name in m._parameters]
        weights = [place[name] for place, name in self._places]
        return [(weight.data_ptr(), weight._version) for weight in weights if weight is not None]


def kept_code(model: Model, differentiate: bool, rounded: torch.dtype | None) -> CodeEvaluation:
    """The code of a model's predictions, from the user's cache or compiled now, which takes a minute.

    Args:
        model: on a CPU.
        differentiate: whether the gradient is wanted.
        rounded: what products of tokens are rounded to in the precision that is set around.

    Raises:
        ConfigError: it cannot be compiled, or the cache belongs to another user.
    """
    folder = cache_folder("compiled")
    if folder is None:  # nowhere to keep it; loaded code stays mapped after its file is gone
        with tempfile.TemporaryDirectory(prefix="escaip-") as private:
            path = Path(private) / "model.pt2"
            return CodeEvaluation(path, model, _write(model, differentiate, path))
    path = folder / f"{_key(model, differentiate, rounded)}.pt2"
    if path.is_file():
        with contextlib.suppress(CheckpointError, OSError, KeyError, ValueError, zipfile.BadZipFile):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith(f"/{INFO}"))
                constants = json.loads(archive.read(name))["constants"]
            code = CodeEvaluation(path, model, constants)
            code.check(model, differentiate, _tolerance(model, rounded))
            path.touch()
            return code
    handle, aside = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".pt2", dir=folder)
    os.close(handle)
    try:
        constants = _write(model, differentiate, Path(aside))
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    _prune(folder)
    return CodeEvaluation(path, model, constants)


def _write(model: Model, differentiate: bool, path: Path) -> dict[str, str]:
    constants, _ = compile_code(model, differentiate, path)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{INFO}", json.dumps({"constants": constants}))
    return constants


def _tolerance(model: Model, rounded: torch.dtype | None) -> float:
    if rounded is not None:
        return 0.1
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 1e-8


def _key(model: Model, differentiate: bool, rounded: torch.dtype | None) -> str:
    parts = [settings_of(model.config), environment(model), differentiate, str(rounded), _OPTIONS, _sources()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Digest of this package: any change of it may change what is compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _prune(folder: Path) -> None:
    """Removes what was not used for longest."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)[:-_MOST_KEPT]:
            path.unlink()


def first_line(error: BaseException) -> str:
    """Of a message, without what ends a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
