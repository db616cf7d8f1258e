"""Speeds of escaip and of other interatomic potentials, measured side by side in one run.

python benchmarks/peers/run.py [--peers escaip fairchem ...] [--suite inference|training|cost|all] [--threads 2]
                               [--repeats 5] [--environments DIR] [--out FILE]

Makes an environment for each peer where there is none, starts a process for each model, and lets them take turns: one
computes at a time, and what slows the machine down for a while slows all alike. What cannot be installed or cannot run
stands in the tables with its reason. See benchmarks/peers/README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import provenance, write_json
from peers import report
from peers.environments import PEERS, EnvironmentFailure, default_folder, interpreter
from peers.measure import Contender, Row, measure_case
from peers.plan import SUITES, VARIANTS, WEIGHTS, Variant, chosen, exporter, grouped
from peers.structures import COST_ATOMS, Structure, cost_case, inference_cases, training_cases
from peers.workers import Worker, WorkerFailure

RESERVE = 2.0  # GiB of memory that must be free to start another process

Case = tuple[str, str, list[Structure]]


def cases(suites: list[str]) -> list[Case]:
    """Suite, name and structures; training comes last, since it changes the weights."""
    found: list[Case] = []
    if "inference" in suites:
        found += [("inference", name, [structure]) for name, structure in inference_cases().items()]
    if "cost" in suites:
        found += [("cost", f"{atoms} Cu", [cost_case(atoms)]) for atoms in COST_ATOMS]
    if "training" in suites:
        found += [("training", name, structures) for name, structures in training_cases().items()]
    return found


class Run:
    """Processes of one group, and the folder for what they leave.

    Args:
        args: of the command line.
        stack: that ends them.
        pythons: of each peer's environment.
        failures: why a peer has none.
    """

    def __init__(
        self, args: argparse.Namespace, stack: ExitStack, pythons: dict[str, Path], failures: dict[str, str]
    ) -> None:
        self.args, self.stack, self.pythons, self.failures = args, stack, pythons, failures
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="escaip-peers-")))
        self.packages: dict[str, dict[str, str]] = {}

    def start(self, variants: list[Variant]) -> list[Contender]:
        """Starts a process for each variant, one after another, and builds its model."""
        contenders: list[Contender] = []
        for variant in variants:
            contender = Contender(variant, why=self.failures.get(variant.peer) or self._lacks(variant, contenders))
            if contender.why is None:
                self._build(contender)
            if contender.why:
                print(f"{variant.name}: {contender.why}", flush=True)
            contenders.append(contender)
        return contenders

    def _build(self, contender: Contender) -> None:
        variant = contender.variant
        slug = "".join(c if c.isalnum() else "-" for c in variant.name)
        contender.worker = self.stack.enter_context(
            Worker(
                self.pythons[variant.peer],
                variant.peer,
                self.folder / f"{slug}.log",
                self._variables(slug),
                self.args.patience,
            )
        )
        options = {key: self._locate(value) for key, value in variant.options.items()}
        limits = {"threads": self.args.threads, "memory_GiB": self.args.memory}
        try:
            contender.built = contender.ask("build", options=options, **limits)
            self.packages.setdefault(variant.peer, contender.built.pop("packages"))
        except WorkerFailure as error:
            contender.why = str(error)

    def _lacks(self, variant: Variant, contenders: list[Contender]) -> str | None:
        """Weights of a variant that did not start, or memory."""
        weights = variant.options.get("weights")
        if weights is not None:
            source = next((item for item in contenders if item.variant.name == exporter(weights)), None)
            if source is None or source.why:
                return f"takes the weights of {exporter(weights)}, which {'failed' if source else 'is not measured'}"
        free = free_GiB()
        if free is not None and free < RESERVE:
            return f"not started: {free:.1f} GiB of memory are left"
        return None

    def _locate(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(WEIGHTS):
            return str(self.folder / value.removeprefix(WEIGHTS))
        return value

    def _variables(self, slug: str) -> dict[str, str]:
        """Threads, and a compiler's cache of its own: the first call pays for its compilation."""
        threads = str(self.args.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        cache = self.folder / f"{slug}-cache"
        return {
            **dict.fromkeys(names, threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "ESCAIP_CACHE": str(self._escaip_cache()),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
        }

    def _escaip_cache(self) -> Path:
        """A cache without compiled evaluations, but with the kernels that this machine has compiled before."""
        folder = self.folder / "escaip-cache"
        if not folder.exists():
            folder.mkdir()
            shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
            native = Path(os.environ.get("ESCAIP_CACHE") or os.path.join(shared, "escaip")) / "native"
            if native.is_dir():
                (folder / "native").symlink_to(native)
        return folder


def make_environments(peers: list[str], args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of each peer's environment, and the reasons of those that could not be made."""
    pythons, failures = {}, {}
    for peer in peers:
        try:
            pythons[peer] = interpreter(peer, args.environments, args.torch_index)
            print(f"{peer}: {pythons[peer]}", flush=True)
        except EnvironmentFailure as error:
            failures[peer] = f"no environment: {error}"
            print(f"{peer}: {failures[peer]}", flush=True)
    return pythons, failures


def describe(contender: Contender) -> dict[str, Any]:
    """A model, for the file of results."""
    found = {"peer": contender.variant.peer, "options": contender.variant.options, **contender.built}
    return found | ({"why": contender.why} if contender.why else {})


def free_GiB() -> float | None:
    """Memory that can be had without swapping; None where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), None)


def measure_group(group: str, contenders: list[Contender], planned: list[Case], repeats: int) -> Iterator[list[Row]]:
    """Every case, with a table as soon as it is done."""
    for suite, name, structures in planned:
        taking_part = [item for item in contenders if suite in item.variant.suites]
        if not taking_part:
            continue
        found = measure_case(taking_part, suite, name, structures, repeats)
        for row in found:
            row.group = group
        print(f"\n{suite}: {name}, {found[0].atoms} atoms\n{report.case_table(found)}", flush=True)
        yield found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--suite", default="inference", choices=(*SUITES, "all"))
    parser.add_argument("--variants", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME", help="only these")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--environments", type=Path, default=default_folder(), help="made where they do not exist")
    parser.add_argument("--torch-index", metavar="URL", help="package index with builds of PyTorch for the CPU")
    parser.add_argument("--memory", type=float, metavar="GiB", help="limit of each process; half of the machine")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds that one request may take")
    parser.add_argument("--together", action="store_true", help="one group: 28 processes need some 15 GiB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in ("threads", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if args.memory is None:
        args.memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31
    args.suites = list(SUITES) if args.suite == "all" else [args.suite]
    args.planned = [case for case in cases(args.suites) if args.cases is None or case[1] in args.cases]
    known = [case[1] for case in cases(args.suites)]
    unknown = [name for name in args.cases or () if name not in known]
    if unknown:
        parser.error(f"--cases: there is no {unknown[0]!r}, only {', '.join(known)}")
    return args


def main() -> None:
    args = arguments()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # ends the workers, removes the folder
    variants = chosen(args.peers, args.suites, args.variants)
    result: dict[str, Any] = {
        "provenance": {**provenance(), "threads": args.threads},
        "repeats": args.repeats,
        "memory_limit_GiB": args.memory,
        "packages": {},
        "models": {},
    }
    rows: list[Row] = []
    pythons, failures = make_environments(list(dict.fromkeys(v.peer for v in variants)), args)
    for group, members in ({"together": variants} if args.together else grouped(variants)).items():
        with ExitStack() as stack:
            run = Run(args, stack, pythons, failures)
            contenders = run.start(members)
            result["packages"] |= run.packages
            result["models"] |= {item.variant.name: describe(item) for item in contenders}
            for found in measure_group(group, contenders, args.planned, args.repeats):
                rows += found
                result["rows"] = [report.to_json(row) for row in rows]
                result["relations"] = report.relations(rows)
                result["slopes"] = report.slopes(rows)
                result["minutes"] = (time.monotonic() - start) / 60.0
                if args.out:
                    write_json(args.out, result)
    for suite in dict.fromkeys(row.suite for row in rows):
        print(f"\n{suite}\n{report.summary_table(rows, suite)}")
    print("", *(report.relation_line(item) for item in report.relations(rows)), sep="\n")
    if slopes := report.slopes(rows):
        print(f"\n{report.slope_table(slopes)}")
    print(f"\n{(time.monotonic() - start) / 60.0:.1f} min")


if __name__ == "__main__":
    main()
