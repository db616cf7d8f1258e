"""Stands in for a run of a study: five steps with a checkpoint after each, and a record that tells nothing of kills."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(study: str, name: str) -> int:
    folder = Path(study) / "jobs" / name
    job = json.loads((folder / "job.json").read_text("utf-8"))
    with (folder / "starts.txt").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    checkpoint = folder / "steps.txt"
    done = int(checkpoint.read_text() or 0) if checkpoint.exists() else 0
    rate = job["config"]["model"]["learning_rate"]
    if os.environ.get("FAIL") and os.environ["FAIL"] in name:
        print("out of memory")
        return 1
    for step in range(done, 5):
        time.sleep(0.04)
        aside = folder / "steps.part"
        aside.write_text(str(step + 1))
        os.replace(aside, checkpoint)
    diverged = rate > 0.1
    record = {
        "id": name, "variant": job["variant"], "size": job["size"], "seed": job["seed"], "parameters": 1000,
        "parameters_total": 1100, "structures": 10, "atoms": 90, "epochs": 1, "steps": 5, "flops": 1e9,
        "learning_rate": rate, "losses": {} if diverged else {"loss": 0.1 + abs(rate - 0.01), "forces_mae": 0.2},
        "curve": [[5, 1e9, 0.1]], "seconds": 0.1, "commit": "abc", "config": job["config"],
    }  # fmt: skip
    aside = folder / "record.part"
    aside.write_text(json.dumps(record) + "\n")
    os.replace(aside, folder / "record.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
