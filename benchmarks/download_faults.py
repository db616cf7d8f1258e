"""Kills a download without warning at random moments and starts it again: nothing may be lost, doubled or sent twice.

    python benchmarks/download_faults.py [--kills 20] [--out results.json]

A server on this machine sends three files slowly and counts what it sends. Each trial downloads them in a process of
its own, kills that process one to three times, each time at a moment drawn over the time that an undisturbed download
takes, and then lets it run to its end. Every second trial has no published checksums to lean on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import provenance, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "data"))

from http_server import PIECE, FileServer, Page, file_server

from escaip.data.download import BLOCK

SIZES = {"a.bin": 6_000_000, "b.bin": 3_500_001, "sub/c.bin": 2_000_000}
PAUSE = 0.004  # after each piece of 16 KiB
JOBS = 2
ALLOWED = BLOCK + 8 * PIECE
"""Bytes that a kill may cost each file: the block on its way, and what the buffers of the system hold."""

SCRIPT = """
import json, sys
from pathlib import Path
from escaip.data.download import download
from escaip.files import DatasetCard
card = DatasetCard("made", "made", {"dataset": {}, "files": json.loads(sys.argv[1])}, Path("card"))
download(card, root=sys.argv[2], jobs=int(sys.argv[3]), progress=False, delay=0.05)
"""


def start(entries: list[dict[str, Any]], root: Path) -> subprocess.Popen[bytes]:
    """The download in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(entries), str(root), str(JOBS)])


def trial(
    server: FileServer, contents: dict[str, bytes], seconds: float, moments: list[float], with_checksums: bool
) -> dict[str, Any]:
    """Some kills and what came of them."""
    server.asked.clear()
    entries = [
        {"name": name, "url": f"{server.address}/{name}"}
        | ({"md5": hashlib.md5(content).hexdigest()} if with_checksums else {})
        for name, content in contents.items()
    ]
    kept: list[dict[str, int]] = []
    wrong_starts = struck = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "made"
        for moment in moments:
            process = start(entries, Path(place))
            time.sleep(moment * seconds)
            process.send_signal(signal.SIGKILL)
            struck += process.wait() == -signal.SIGKILL
            kept.append({name: bytes_of(folder / name) for name in contents})
            wrong_starts += sum(not begins(folder / name, content) for name, content in contents.items())
        returned = start(entries, Path(place)).wait()
        same = all((folder / name).read_bytes() == content for name, content in contents.items())
        leftovers = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and str(path.relative_to(folder)) not in contents and path.suffix != ".verified"
        )
    again = {name: server.sent(f"/{name}") - len(content) for name, content in contents.items()}
    return {
        "kills_at_seconds": [round(moment * seconds, 3) for moment in moments],
        "struck": struck,
        "with_checksums": with_checksums,
        "kept": kept,
        "wrong_beginnings": wrong_starts,
        "fetched_again": again,
        "requests": {name: [item.start for item in server.got(f"/{name}")] for name in contents},
        "returned": returned,
        "same": same,
        "leftovers": leftovers,
        "good": returned == 0
        and same
        and not leftovers
        and not wrong_starts
        and all(0 <= count <= ALLOWED * struck for count in again.values())
        and all(starts_agree(server, name, kept) for name in contents),
    }


def bytes_of(path: Path) -> int:
    """Of a file or its part."""
    part = path.with_name(f"{path.name}.part")
    return next((entry.stat().st_size for entry in (path, part) if entry.exists()), 0)


def begins(path: Path, content: bytes) -> bool:
    """What is there is a beginning of the file, and all of it if it has its name."""
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path.read_bytes() == content
    return not part.exists() or content.startswith(part.read_bytes())


def starts_agree(server: FileServer, name: str, kept: list[dict[str, int]]) -> bool:
    """Every request begins at the first byte that was not there."""
    there = {0, *(item[name] for item in kept)}
    starts = [item.start for item in server.got(f"/{name}")]
    return starts == sorted(starts) and set(starts) <= there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials, each with one to three kills (default: 20)")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rng = random.Random(0)
    contents = {name: rng.randbytes(size) for name, size in SIZES.items()}
    with file_server() as server, tempfile.TemporaryDirectory() as place:
        server.pages |= {f"/{name}": Page(content, pause=PAUSE) for name, content in contents.items()}
        began = time.perf_counter()
        entries = [{"name": name, "url": f"{server.address}/{name}"} for name in contents]
        if start(entries, Path(place)).wait() != 0:
            sys.exit("the undisturbed download failed")
        seconds = time.perf_counter() - began
        trials = []
        for number in range(options.kills):
            count = rng.randint(1, 3)
            moments = [rng.uniform(0.2, 1.0) / count**0.5 for _ in range(count)]  # before that, Python imports
            trials.append(trial(server, contents, seconds, moments, with_checksums=number % 2 == 0))
            print(trials[-1], flush=True)
    bad = sum(not item["good"] for item in trials)
    kills = sum(item["struck"] for item in trials)
    again = max(sum(item["fetched_again"].values()) / max(1, item["struck"]) for item in trials)
    summary = {
        "trials": len(trials),
        "kills_before_the_end": kills,
        "bad": bad,
        "bytes_of_a_download": sum(SIZES.values()),
        "undisturbed_seconds": seconds,
        "most_fetched_again_per_kill": again,
        "block": BLOCK,
        "files_at_a_time": JOBS,
    }
    print(f"{len(trials)} downloads, {kills} kills before the end, {bad} bad; {again:.0f} bytes again per kill at most")
    if options.out:
        write_json(options.out, {"provenance": provenance(), "summary": summary, "trials": trials})
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
