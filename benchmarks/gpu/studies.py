"""Commands that a user types, in the time there is: the quickstart, and the scaling study."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from gpu.runner import Row, Setting

ROOT = Path(__file__).resolve().parents[2]
ESCAIP = (sys.executable, "-m", "escaip")


def quickstart(setting: Setting) -> Iterator[Row]:
    """Trains the quickstart recipe; the end of its output tells how far it came."""
    if setting.small:
        return
    command = [*ESCAIP, "fit", "--config", "quickstart", "--out", str(setting.out / "quickstart")]
    command += ["--trainer.accelerator", "gpu" if setting.device == "cuda" else "cpu"]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, setting.left - 2), check=False)
        status, output = f"status {done.returncode}", done.stdout[-3000:] + done.stderr[-1000:]
    except subprocess.TimeoutExpired as expired:
        status, output = "no time left", (expired.stdout or b"").decode(errors="replace")[-3000:]
    yield {"recipe": "quickstart", "seconds": time.monotonic() - start, "ended": status, "output": output}


STUDY = Path("runs/gpu_suite_scaling")  # checkpoints are large: only tables and plots go to --out
STUDY_FILES = ("study.json", "sweep.jsonl", "records.jsonl", "fit.json", "report.md", "scaling.png")


def small_study(file: Path) -> Path:
    """The study of the GPU with little of everything."""
    content = yaml.safe_load((ROOT / "configs" / "scaling" / "h200.yaml").read_text("utf-8"))
    content |= {"widths": [32, 64], "data_sizes": [0.05, 0.1, 0.2], "epochs": 1, "seeds": [0], "learning_rate": 1e-3}
    content["settings"]["data"]["split"]["by"] = "structure"  # so that every part has all elements
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content), "utf-8")
    return file


def scaling(setting: Setting) -> Iterator[Row]:
    """A scaling study: a row for each run that ended; its tables and plots under ``out``."""
    from escaip.scaling.study import RECORDS, read_records

    small, out = setting.small, setting.out
    study = out / "study" if small else STUDY
    name = str(small_study(out / "small.yaml")) if small else "h200"
    command = [*ESCAIP, "scaling", "run", name, "--out", str(study), "--workers", "2" if small else "6", "--set"]
    accelerator = "gpu" if setting.device == "cuda" else "cpu"
    command += [f"data.train=[{', '.join(setting.data)}]", f"trainer.accelerator={accelerator}"]
    process = subprocess.Popen(command)
    try:
        status = f"status {process.wait(max(1.0, setting.left - 15.0))}"
    except subprocess.TimeoutExpired:
        process.kill()  # takes its runs with it; what has a checkpoint goes on from there
        process.wait()
        status = "no time left"
    if not (study / RECORDS).is_file():
        yield {"run": None, "failed": status}
        return
    records = read_records(study)
    with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):  # too few runs for any law
        subprocess.run([*ESCAIP, "scaling", "plot", str(study)], check=True, timeout=60.0)
    for file in STUDY_FILES:
        if (study / file).is_file():
            (out / "scaling").mkdir(parents=True, exist_ok=True)
            shutil.copy(study / file, out / "scaling" / file)
    for one in records:
        row = {"run": one.id, "parameters": one.parameters, "structures": one.structures, "steps": one.steps}
        yield row | {"flops": one.flops, "seconds": one.seconds, **one.losses, "failed": None}
    missing = len(json.loads((study / "study.json").read_text("utf-8"))["jobs"]) - len(records)
    if missing:
        yield {"run": f"{missing} more", "failed": status}
