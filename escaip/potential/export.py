"""Packages: a model file together with machine code for its evaluation (docs/howto/files.md).

A package is a ``.pt2`` archive of ``torch._inductor.aoti_compile_and_package`` with two more entries, ``escaip.json``
and ``weights.safetensors``. The code holds no weights; it receives those of the potential. Reading weights, description
or origin of a package runs nothing in it.
"""

from __future__ import annotations

import copy
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip.errors import CheckpointError, ConfigError
from escaip.files import first_line, write_aside
from escaip.models import Model
from escaip.ops import cpp
from escaip.potential.compile import INFO, AotCode, add_entries, compile_ahead, environment, read_entry
from escaip.potential.derivatives import EagerEvaluator, EvaluationInputs, EvaluationRequest
from escaip.potential.potential import Potential, build_potential
from escaip.potential.precision import in_precision, resolve_device, resolve_dtype
from escaip.types import ModelOutput

FORMATS = ("escaip", "aoti")
SUFFIX = ".pt2"
WEIGHTS = "weights.safetensors"
VERSION = 4
_LOAD_INSTEAD = "load the .escaip file (escaip export PACKAGE --format escaip writes it)"
_WARNING = (
    "a package is machine code for this kind of processor and this torch version: exchange .escaip files instead, and "
    "load only packages that you made"
)


class ExportedEvaluator:
    """Evaluates predictions by the code of a package; copies share the code.

    Evaluations that recompute activations, and those whose positions require gradients, run uncompiled from the
    weights of the model.

    Args:
        path: of the package.
        model: with the weights of the package.
        constants: name of the weight that each constant of the code is.

    Raises:
        CheckpointError: the code cannot be loaded, or does not give what the weights give.
    """

    def __init__(self, path: Path, model: Model, constants: dict[str, str]) -> None:
        self._code = AotCode(path, model, constants)
        self._code.check(model, model.config.is_conservative)

    def __call__(
        self, model: Model, inputs: EvaluationInputs, request: EvaluationRequest
    ) -> tuple[ModelOutput, Tensor | None]:
        """Evaluates a batch; see ``escaip.potential.derivatives.Evaluator``.

        Raises:
            ConfigError: a model in training, of another dtype or device, or in another precision.
        """
        learned = request.learning and any(weight.requires_grad for weight in model.parameters())
        if model.training or learned:
            raise ConfigError(f"a package cannot be trained: {_LOAD_INSTEAD}")
        if request.share_recomputed(model.config, inputs) or inputs.vectors.requires_grad:
            return EagerEvaluator()(model, inputs, request)
        if not self._code.fits(model):
            raise ConfigError(f"a package has the dtype and device that it was exported for: {_LOAD_INSTEAD}")
        with in_precision(request.precision, inputs.vectors.device) as rounded:
            if rounded is not None or request.precision != "highest":
                raise ConfigError(f"a package has no other precision than that of its weights: {_LOAD_INSTEAD}")
            return self._code(model, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedEvaluator:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _evaluator_of, (str(self._code.path.resolve()), str(self._code.device))


def export_model(
    potential: Potential,
    out: str | os.PathLike[str],
    format: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Writes a potential in a format of ``FORMATS``.

    Args:
        potential: on the CPU, as stored; may be changed.
        out: the file to write.
        format: ``"escaip"`` for weights and description, ``"aoti"`` for a package.
        device: of a package, by default the CPU.
        dtype: ``"float32"`` or ``"float64"``; by default as stored.

    Returns:
        Lines that say what was written.

    Raises:
        CheckpointError: the file cannot be written.
        ConfigError: an option that does not fit the format, a device that is missing, or code that does not compile.
    """
    check_request(out, format, device)
    if dtype is not None:
        potential = potential.to(resolve_dtype(dtype))
    if format == "escaip":
        potential.save(out)
        return [f"wrote {os.fspath(out)}"]
    made = save_package(potential.to(resolve_device(device or "cpu")), out)
    line = f"wrote {os.fspath(out)}: {made['dtype']}, {made['device']}, {made['machine']}, torch {made['torch']}"
    return [line, _WARNING]


def check_request(out: str | os.PathLike[str], format: str, device: str | None) -> None:
    """Raises ConfigError where format, name of the file and device do not fit each other."""
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} does not exist: choose {' or '.join(FORMATS)}")
    name, is_package_name = os.fspath(out), Path(out).suffix == SUFFIX
    if format == "aoti" and not is_package_name:
        raise ConfigError(f"--out {name}: machine code is run only from files named *{SUFFIX}: choose such a name")
    if format == "escaip" and is_package_name:
        raise ConfigError(f"--out {name}: {SUFFIX} is for packages, of --format aoti: choose a name in .escaip")
    if format == "escaip" and device is not None:
        raise ConfigError("an .escaip file is for every device: leave --device out")


def save_package(potential: Potential, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Compiles predictions of a potential for its device and dtype, and writes them with the potential.

    This takes some minutes. The file is written whole or not at all.

    Returns:
        The description of the code, see ``describe_package``.

    Raises:
        CheckpointError: the file cannot be written.
        ConfigError: the evaluation cannot be compiled here.
    """
    from safetensors.torch import save

    potential = copy.deepcopy(potential).eval().requires_grad_(False)
    with write_aside(path, CheckpointError) as aside:
        aside.touch()  # fails before minutes of compiling where the folder is missing
        with in_precision("highest", potential.device):
            constants, has_native = compile_ahead(potential.model, potential.config.is_conservative, aside)
        made = {"version": VERSION, **environment(potential.device, potential.dtype), "native_kernels": has_native}
        info = {"package": made, "model": potential.describe(), "constants": constants}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
        add_entries(aside, {INFO: json.dumps(info).encode(), WEIGHTS: save(weights)})
    return made


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a package, by its content, or is meant as one, by its name."""
    if Path(path).suffix == SUFFIX:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{INFO}") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def describe_package(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what the code of a package was compiled for: versions, processor, device and dtype."""
    return dict(_read(Path(path))[0]["package"])


def read_package(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns description and weights of the model in a package.

    Raises:
        CheckpointError: damaged.
    """
    info, weights = _read(path)
    return info["model"], weights


def load_package(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    dataset: str | None = None,
    precision: str = "highest",
) -> Potential:
    """Reads a package and **runs machine code from it**; see ``escaip.load_potential`` for the arguments.

    Raises:
        CheckpointError: not named ``.pt2``, damaged, for another machine or installation, or code that does not give
            what the weights give.
        ConfigError: another device, dtype or precision than the package has.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"{path} holds machine code, which is run only from files named *{SUFFIX}: if you made it, rename it"
        )
    info, weights = _read(path)
    made = info["package"]
    chosen = resolve_device(made.get("device", "cpu") if device == "auto" else device)
    wanted = resolve_dtype(made.get("dtype", "float32") if dtype is None else dtype)
    _check_environment(path, made, environment(chosen, wanted))
    if precision != "highest":
        raise ConfigError(f"{path} is a package, which has no precision {precision!r}: {_LOAD_INSTEAD}")
    potential = build_potential(info["model"], weights, path)
    if dataset is not None:
        potential.choose_dataset(dataset)
    potential = potential.to(chosen).eval().requires_grad_(False)
    potential.evaluator = ExportedEvaluator(path, potential.model, info["constants"])
    return potential


def _evaluator_of(path: str, device: str) -> Any:
    return load_package(path, device).evaluator


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        info = json.loads(read_entry(path, INFO))
        return {key: dict(info[key]) for key in ("package", "model", "constants")}, load(read_entry(path, WEIGHTS))
    except (zipfile.BadZipFile, StopIteration, KeyError, TypeError, ValueError, SafetensorError, OSError) as error:
        reason = first_line(error).rstrip(".:")
        raise CheckpointError(f"{path} is no package, or is damaged ({reason}): export it again") from error


def _check_environment(path: Path, made: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises CheckpointError where the code of a package cannot run, ConfigError for another device or dtype."""
    remedy = "export it again from its .escaip file here"
    for name, value in {"format version": VERSION, **here}.items():
        found = made.get("version" if name == "format version" else name)
        missing = sorted(set(found or []) - set(value)) if name == "instructions" else []
        if missing:
            raise CheckpointError(f"{path} needs a processor with {', '.join(missing)}, which this one lacks: {remedy}")
        if name != "instructions" and found != value:
            kind = ConfigError if name in ("device", "dtype") else CheckpointError
            raise kind(f"{path} is a package for {name} {found}, and not for {value}: {remedy}")
    problem = cpp.unavailable() if made.get("native_kernels") else None
    if problem is not None:
        raise CheckpointError(f"{path} {problem}")
