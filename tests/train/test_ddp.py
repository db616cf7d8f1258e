"""Two processes (gloo) train as one process does on the union of their batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import ddp_script
import numpy as np

SCRIPT = Path(__file__).with_name("ddp_script.py")


def _train_two(folder: Path) -> dict[str, list]:
    target = folder / "two.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, SCRIPT.parents[:3]))}
    command = [sys.executable, str(SCRIPT), "2", str(target)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(target.read_text(encoding="utf-8"))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        ddp_script.main(1, str(tmp_path / "one.json"))
    one, two = json.loads((tmp_path / "one.json").read_text(encoding="utf-8")), _train_two(tmp_path)
    assert len(one["figures"]) == len(two["figures"]) == 8
    for alone, together in zip(one["figures"], two["figures"], strict=True):
        np.testing.assert_allclose(together, alone, rtol=2e-6)  # Lightning logs in float32
    np.testing.assert_allclose(two["weights"], one["weights"], rtol=1e-8, atol=1e-10)
