"""Model files in other formats, and compiled ahead of time (docs/export.md)."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from escaip.errors import CheckpointError, ConfigError
from escaip.potential import Potential
from escaip.potential.ahead import INFO, compile_code, environment
from escaip.potential.loading import describe_potential, read_potential, resolve_device, resolve_dtype
from escaip.potential.packaged import SUFFIX, VERSION, WEIGHTS
from escaip.potential.precision import in_precision

FORMATS = ("escaip", "aoti")
_WARNING = (
    "a package is machine code for this kind of processor and this torch version: exchange .escaip files instead, and "
    "load only packages that you made"
)


def check_request(out: str | os.PathLike[str], format: str, device: str | None) -> str:
    """Returns the format, where it, the name of the file and the device fit each other.

    Raises:
        ConfigError: they do not.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} does not exist: choose {' or '.join(FORMATS)}")
    is_code, name = format == "aoti", os.fspath(out)
    if is_code and Path(out).suffix != SUFFIX:
        raise ConfigError(f"--out {name}: machine code is run only from files named *{SUFFIX}: choose such a name")
    if not is_code and Path(out).suffix == SUFFIX:
        raise ConfigError(f"--out {name}: {SUFFIX} is for packages, of --format aoti: choose a name in .escaip")
    if device is not None and not is_code:
        raise ConfigError("an .escaip file is for every device: leave --device out")
    return format


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Writes a model file in another format.

    Args:
        model: ``.ckpt``, ``.escaip`` or a package.
        out: the file to write.
        format: ``"escaip"`` for weights and description, ``"aoti"`` for a package.
        device: of a package, by default the CPU.
        dtype: ``"float32"`` or ``"float64"``; by default as stored.

    Returns:
        Lines that say what was written.

    Raises:
        CheckpointError: the model cannot be read, or the file cannot be written.
        ConfigError: an option that does not fit the format, a device that is not there, or code that does not compile.
    """
    is_code, name = check_request(out, format, device) == "aoti", os.fspath(out)
    potential = read_potential(model)
    if dtype is not None:
        potential = potential.to(resolve_dtype(dtype))
    if not is_code:
        potential.save(out)
        return [f"wrote {name}"]
    made = save_package(potential.to(resolve_device(device or "cpu")), out)
    return [f"wrote {name}: {made['dtype']}, {made['device']}, {made['machine']}, torch {made['torch']}", _WARNING]


def save_package(potential: Potential, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Compiles the evaluation of a potential where and in the precision it is, and writes it with the potential.

    Takes some minutes. The file is written aside and renamed.

    Returns:
        What :func:`describe_package` will say.

    Raises:
        CheckpointError: the file cannot be written.
        ConfigError: the evaluation cannot be compiled here.
    """
    from safetensors.torch import save

    path = Path(path)
    potential = copy.deepcopy(potential).eval().requires_grad_(False)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.touch()  # a folder that is not there should cost no minutes
        with tempfile.TemporaryDirectory(prefix="escaip-") as folder:
            code = Path(folder) / f"model{SUFFIX}"
            with in_precision("highest", potential.device):
                constants, has_native = compile_code(potential.model, potential.config.is_conservative, code)
            made = {"version": VERSION, **environment(potential.model), "native_kernels": has_native}
            info = {"package": made, "model": describe_potential(potential), "constants": constants}
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
            with zipfile.ZipFile(code, "a") as archive:
                root = archive.namelist()[0].split("/")[0]
                archive.writestr(f"{root}/{INFO}", json.dumps(info))
                archive.writestr(f"{root}/{WEIGHTS}", save(weights))
            shutil.copyfile(code, aside)
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}: choose another --out") from error
    finally:
        aside.unlink(missing_ok=True)
    return made
