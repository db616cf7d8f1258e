"""Packages: a model file together with machine code for its evaluation (docs/export.md), made by
:mod:`escaip.potential.export`.

A package is a ``.pt2`` archive of ``torch._inductor.aoti_compile_and_package`` with two entries more, ``escaip.json``
and ``weights.safetensors``. The code holds no weights: it is given those of the potential when it is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip import __version__
from escaip.errors import CheckpointError, ConfigError
from escaip.models import Model
from escaip.ops.native.build import availability
from escaip.potential import Potential
from escaip.potential.ahead import INFO, CodeEvaluation, first_line, instructions
from escaip.potential.derivatives import EvaluationInputs
from escaip.potential.loading import build_potential, resolve_device, resolve_dtype
from escaip.types import ModelOutput

SUFFIX = ".pt2"
WEIGHTS = "weights.safetensors"
VERSION = 1
_LOAD_INSTEAD = "load the .escaip file (escaip export PACKAGE --format escaip writes it)"


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a package, by its content, or is meant as one, by its name; nothing in it is run."""
    if Path(path).suffix == SUFFIX:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{INFO}") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def describe_package(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the code of a package was compiled for; nothing in it is run."""
    return dict(_read(Path(path))[0]["package"])


def read_packaged(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights in a package; nothing in it is run.

    Raises:
        CheckpointError: damaged.
    """
    info, weights = _read(path)
    return info["model"], weights


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith(f"/{INFO}"))[: -len(INFO)]
            info = json.loads(archive.read(f"{root}{INFO}"))
            return {key: dict(info[key]) for key in ("package", "model", "constants")}, load(
                archive.read(f"{root}{WEIGHTS}")
            )
    except (zipfile.BadZipFile, StopIteration, KeyError, TypeError, ValueError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no package, or is damaged ({first_line(error)}): export it again") from error


def _check_environment(path: Path, made: dict[str, Any]) -> None:
    """Raises CheckpointError where the code of a package cannot run."""
    remedy = "export it again from its .escaip file here"
    for what, here in (
        ("version", VERSION), ("escaip", __version__), ("torch", torch.__version__), ("platform", sys.platform),
        ("machine", platform.machine()),
    ):  # fmt: skip
        if made.get(what) != here:
            name = "format version" if what == "version" else what
            raise CheckpointError(f"{path} is a package for {name} {made.get(what)}, and this is {here}: {remedy}")
    missing = sorted(set(made.get("instructions", [])) - set(instructions()))
    if missing:
        raise CheckpointError(f"{path} needs a processor with {', '.join(missing)}, which this one lacks: {remedy}")
    problem = availability() if made.get("native_kernels") else None
    if problem is not None:
        raise CheckpointError(f"{path} {problem}")


def load_package(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    dataset: str | None = None,
    precision: str = "highest",
) -> PackagedPotential:
    """Reads a package and **runs machine code from it**; arguments as of :func:`escaip.load_potential`.

    Raises:
        CheckpointError: not named ``.pt2``, damaged, for another machine or installation, or not what its weights give.
        ConfigError: another device, dtype or precision than the package has.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"{path} holds machine code, which is run only from files named *{SUFFIX}: if you made it, rename it"
        )
    info, weights = _read(path)
    made = info["package"]
    _check_environment(path, made)
    chosen = resolve_device(made.get("device", "cpu") if device == "auto" else device)
    _check_request(path, made, chosen, dtype, precision)
    potential = build_potential(info["model"], weights, path, PackagedPotential)
    if dataset is not None:
        potential.choose_dataset(dataset)
    potential = potential.to(chosen).eval().requires_grad_(False)
    potential.attach(PackagedEvaluation(path, potential, info["constants"]))
    return potential


def _check_request(
    path: Path, made: dict[str, Any], device: torch.device, dtype: torch.dtype | str | None, precision: str
) -> None:
    remedy = f"leave it out, or use the .escaip file (escaip export {path} --format escaip)"
    if device.type != made.get("device"):
        raise ConfigError(f"{path} is a package for {made.get('device')}, not for device {device}: {remedy}")
    if device.type == "cuda" and list(torch.cuda.get_device_capability(device)) != made.get("capability"):
        raise ConfigError(f"{path} is a package for compute capability {made.get('capability')}: export it again here")
    if dtype is not None and str(resolve_dtype(dtype)).removeprefix("torch.") != made.get("dtype"):
        raise ConfigError(f"{path} is a package for {made.get('dtype')}, not for dtype {dtype}: {remedy}")
    if precision != "highest":
        raise ConfigError(f"{path} is a package, which has no precision {precision!r}: {remedy}")


class PackagedEvaluation(CodeEvaluation):
    """The compiled evaluation in a package, given the weights of a potential, which stay; copies share it.

    Args:
        path: of the package.
        potential: of its weights.
        constants: the weight that each constant of the code is.

    Raises:
        CheckpointError: the code cannot be loaded, or does not give what the weights give.
    """

    compiles = False

    def __init__(self, path: Path, potential: Potential, constants: dict[str, str]) -> None:
        super().__init__(path, potential.model, constants)
        self.check(potential.model, self._config.is_conservative, 1e-3 if potential.dtype == torch.float32 else 1e-8)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """As :func:`~escaip.potential.derivatives.energy_and_gradient`; the gradient is always there."""
        if self._state_of(model) != self._state:
            raise ConfigError(f"weights of the package {self.path} were changed: {_LOAD_INSTEAD}")
        return super().__call__(model, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackagedEvaluation:
        return self


class PackagedPotential(Potential):
    """A potential whose evaluations run the code of a package, made by :func:`load_package`.

    Its weights, dtype and device are fixed and it cannot be trained. Evaluations that other compiled potentials do not
    compile (very large ones, and those whose positions require gradients) run uncompiled from its weights.
    """

    _code: PackagedEvaluation | None = None

    def attach(self, code: PackagedEvaluation) -> None:
        """From now on the weights are fixed, and evaluated by this code."""
        self._code = code
        self._is_compiled = True

    def compile(self, *_: Any, cuda_graphs: bool = False, **__: Any) -> None:
        """It is compiled.

        Raises:
            ConfigError: ``cuda_graphs``.
        """
        if cuda_graphs:
            raise ConfigError(f"a package is not recorded in CUDA graphs: {_LOAD_INSTEAD}")

    def train(self, mode: bool = True) -> PackagedPotential:
        """As any module's.

        Raises:
            ConfigError: of training mode.
        """
        if mode and self._code is not None:
            raise ConfigError(f"a package cannot be trained: {_LOAD_INSTEAD}")
        super().train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PackagedPotential:
        """As any module's.

        Raises:
            ConfigError: of gradients of the weights.
        """
        if requires_grad and self._code is not None:
            raise ConfigError(f"a package cannot be trained: {_LOAD_INSTEAD}")
        super().requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PackagedPotential:
        if self._code is None:
            super()._apply(fn, recurse)
            return self
        weight = next(self.model.parameters())
        moved = fn(weight)
        if (moved.dtype, moved.device) != (weight.dtype, weight.device):
            was, wanted = (f"{x.dtype} on {x.device}".removeprefix("torch.") for x in (weight, moved))
            raise ConfigError(f"a package for {was} cannot be made one for {wanted}: {_LOAD_INSTEAD}")
        return self

    def _compiled_evaluation(self, differentiate: bool, learning: bool, rounded: torch.dtype | None) -> Any:
        if rounded is not None or self.precision != "highest":
            raise ConfigError(f"a package has no other precision than that of its weights: {_LOAD_INSTEAD}")
        return self._code

    def __deepcopy__(self, memo: dict[int, Any]) -> PackagedPotential:
        """Shares weights and code, which nobody can change, and nothing else that can be chosen."""
        other = PackagedPotential.__new__(PackagedPotential)
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Names the package: it is loaded again where this is unpickled."""
        assert self._code is not None
        chosen = {"_dataset": self._dataset, "recompute": self.recompute, "precision": self.precision}
        return load_package, (str(self._code.path.resolve()), str(self.device)), chosen
