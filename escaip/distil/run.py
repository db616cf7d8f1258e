"""The steps of a distillation: labels, active rounds, training, report; each goes on where a kill left it.

A training is a process of its own, ``python -m escaip.distil.run fit …``, that ends with the process that began it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from escaip import __version__
from escaip.data import AtomicData
from escaip.data.store import Store
from escaip.data.store_writer import StoreWriter
from escaip.distil.labels import Job, Labeler, LabelLog, frames_of
from escaip.distil.plan import DistilPlan, Dynamics
from escaip.distil.structures import Structure, generator, make_bases, make_variations
from escaip.errors import ConfigError, DataError, TrainingError
from escaip.evaluate.run import evaluate
from escaip.files import aligned, config_path, read_yaml, sha256, try_lock, write_file, write_json, write_results
from escaip.potential import load_potential
from escaip.signals import run_as_child
from escaip.simulate.guards import find_contact
from escaip.simulate.select import score_frames, select_frames

PARTS = ("train", "val", "test")
TEACHER, LOG = "teacher.json", "train.log"
COMMAND = (sys.executable, "-m", "escaip.distil.run", "fit")
"""Begins a training, given the options of `escaip fit`."""
_FMAX = 0.02  # eV/Å, of bases that are relaxed
_EVERY, _POLL = 10.0, 0.1  # s between lines of progress, and looks at a training
_VALIDATED = 200  # validation frames whose spread says what surprises


@dataclass(frozen=True)
class Distilled:
    """What a distillation has made.

    Attributes:
        model: the potential; None where only labels were asked for.
        data: folder of the prepared stores ``train``, ``val`` and ``test``.
        frames: labelled frames by entry of the plan.
        left_out: jobs without any label, by reason.
        errors: mean absolute errors on held-out frames by entry of the plan, and of all of them: meV/atom, meV/Å and
            meV/Å³.
        rounds: share of surprising frames in each active round.
    """

    model: Path | None
    data: Path
    frames: dict[str, int]
    left_out: dict[str, int]
    errors: dict[str, dict[str, float]]
    rounds: list[float]

    def summary(self) -> str:
        """Returns a table and a few lines for people."""
        rows: list[tuple[str, ...]] = [("entry", "frames", "energy meV/atom", "forces meV/Å", "stress meV/Å³")]
        for name in [*self.frames, "all"]:
            count = sum(self.frames.values()) if name == "all" else self.frames[name]
            own = self.errors.get(name, {})
            shown = (f"{own[key]:.2f}" if key in own else "-" for key in ("energy", "forces", "stress"))
            rows.append((name, str(count), *shown))
        lines = aligned(rows, numbers=True)
        if self.left_out:
            worst = max(self.left_out, key=lambda reason: self.left_out[reason])
            lines.append(f"{sum(self.left_out.values())} jobs gave no label, most of them because: {worst}")
        if self.rounds:
            lines.append("surprising frames by round: " + ", ".join(f"{100 * share:.0f} %" for share in self.rounds))
        return "\n".join([*lines, f"wrote {self.data}" + (f" and {self.model}" if self.model else "")])


def _print(line: str) -> None:
    print(line, flush=True)


def distil(
    plan: DistilPlan, out: str | os.PathLike[str], teacher: Labeler, *, workers: int = 1, labels_only: bool = False,
    say: Callable[[str], None] = _print, stop: Callable[[], bool] = lambda: False,
) -> Distilled:  # fmt: skip
    """Labels structures by a calculator, trains a potential on them, and reports its errors on what was held out.

    The folder ``out`` holds ``labels/`` (one line for each job), ``data/`` and ``training/`` of each round, and in the
    end ``NAME.escaip`` and ``report.json``. The same call goes on where an earlier one ended, whatever ended it; a plan
    with other structures keeps the labels that are there.

    Args:
        plan: what is labelled and trained.
        out: folder.
        teacher: the calculator.
        workers: processes that label, or train, at once.
        labels_only: end when the plan's own structures are labelled and stored.
        say: shows a line of progress; by default on standard output.
        stop: asked every tenth of a second while others work; True raises KeyboardInterrupt.

    Raises:
        ConfigError: an entry of the plan, or the calculator, cannot be used.
        DataError: the folder holds labels of another teacher, another process works in it, or a file is damaged.
        TrainingError: a training failed.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}: at least 1")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / "lock")
    if lock is None:
        raise DataError(f"{folder}: another process works in it: wait for it, or choose another folder")
    with lock:
        campaign = _Campaign(plan, folder, teacher, workers, say, stop)
        campaign.claim()
        campaign.label_first()
        if labels_only:
            return campaign.result(campaign.store("final"))
        for number in range(plan.rounds.count):
            if campaign.round(number) <= plan.rounds.stop:
                break
        return campaign.finish()


class _Campaign:
    def __init__(
        self, plan: DistilPlan, folder: Path, teacher: Labeler, workers: int, say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._plan, self._folder, self._teacher, self._workers = plan, folder, teacher, workers
        self._say, self._stop = say, stop
        self._log = LabelLog(folder / "labels" / "teacher.jsonl")
        self._bases: dict[str, list[Structure]] = {}
        self._jobs: list[Job] = []
        self._shares: list[float] = []
        self._ended = False

    def claim(self) -> None:
        """Writes who the teacher is, or refuses a folder with the labels of another one."""
        plan, path = self._plan.teacher, self._folder / TEACHER
        bounds = {"max_force": plan.max_force, "max_stress": plan.max_stress}
        mine = {"calculator": self._teacher.calculator, "arguments": plan.arguments, **bounds}
        if path.is_file():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if differing := [key for key, value in mine.items() if theirs.get(key) != value]:
                raise DataError(
                    f"{self._folder}: its labels are of a teacher with another {', '.join(differing)}: choose another "
                    "folder"
                )
        else:
            write_json(path, mine)

    def label_first(self) -> None:
        """Labels bases, their variations and the dynamics of the teacher."""
        plan = self._plan
        made = {name: make_bases(name, base, plan.seed) for name, base in plan.bases.items()}
        jobs: dict[str, list[Job]] = {}
        for name, structures in made.items():
            base = plan.bases[name]
            settings = {"steps": base.relax, "fmax": _FMAX}
            taken = not base.relax or bool(base.dimers)
            jobs[name] = [Job(one, "label") if taken else Job(one, "relax", settings) for one in structures]
        self._label("bases", [job for members in jobs.values() for job in members])
        for name, members in jobs.items():
            answers = [(job, frames_of(job, self._log[job.key])) for job in members]
            self._bases[name] = [replace(job.structure, atoms=frames[-1]) for job, frames in answers if frames]
        wanted = [
            Job(one, "label")
            for name, entry in plan.structures.items() for one in make_variations(name, entry, self._bases, plan.seed)
        ]  # fmt: skip
        for name, entry in plan.dynamics.items():
            wanted += self._dynamics(name, entry, 0)
        self._label("structures and dynamics", wanted)

    def _dynamics(self, name: str, entry: Dynamics, number: int, **further: Any) -> list[Job]:
        """Returns runs; those of each round have structures, velocities and names of their own."""
        structures = make_variations(name, entry, self._bases, self._plan.seed + 1000 * number)
        jobs = []
        for index, one in enumerate(structures):
            settings = {
                "temperature": entry.temperatures[index % len(entry.temperatures)], "timestep": entry.timestep,
                "every": entry.every, "frames": max(1, entry.steps // entry.every), "relax": entry.relax,
                "seed": int(generator(self._plan.seed, name, number, index).integers(2**31)), **further,
            }  # fmt: skip
            jobs.append(Job(one, "dynamics", settings))
        return jobs

    def _go_on(self) -> None:
        if self._ended or self._stop():
            raise KeyboardInterrupt

    def _label(self, what: str, jobs: Sequence[Job]) -> None:
        self._jobs += jobs
        version = self._run(self._teacher, jobs, self._log, what)
        path = self._folder / TEACHER
        known = json.loads(path.read_text(encoding="utf-8"))
        if version and known.get("version") != version:
            write_json(path, {**known, "version": version})

    def _run(self, labeler: Labeler, jobs: Sequence[Job], log: LabelLog, what: str) -> str:
        missing, began, last = len({job.key for job in jobs if job.key not in log}), time.monotonic(), 0.0
        if not missing:
            return ""
        self._say(f"{what}: {missing} of {len(jobs)} jobs to do")

        def progress(done: int, failed: int) -> None:
            nonlocal last
            now = time.monotonic() - began
            if done == missing or now - last > _EVERY:
                last = now
                lost = f", {failed} without a label" if failed else ""
                left = now / done * (missing - done)
                self._say(f"{what}: {done} of {missing} done{lost}; {now:.0f} s, {left:.0f} left")

        return labeler.run(jobs, log, self._workers, progress, self._stop)

    def store(self, stage: str) -> Path:
        """Writes all labelled frames as three prepared stores, unless they are there already; returns their folder."""
        folder = self._folder / "data" / stage
        jobs = [job for job in self._jobs if self._log[job.key]["frames"]]
        hold_out, named = asdict(self._plan.hold_out), [(job.structure.name, job.key) for job in jobs]
        digest = _digest(hold_out, self._plan.seed, named)
        marker = folder / "made.json"
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")).get("digest") == digest:
            return folder
        divided: dict[str, list[Job]] = {part: [] for part in PARTS}
        for job in jobs:
            divided[self._part(job)].append(job)
        for part in ("train", "val"):
            if not divided[part]:
                raise DataError(
                    f"hold_out leaves no frame for {part}: label more structures, or hold out by job instead of by base"
                )
        marker.unlink(missing_ok=True)
        teacher = json.loads((self._folder / TEACHER).read_text(encoding="utf-8"))
        facts = {
            "dataset": self._plan.name, "level_of_theory": self._plan.teacher.level_of_theory, "teacher": teacher,
            "seed": self._plan.seed,
        }  # fmt: skip
        if self._plan.teacher.licence:
            facts["licence"] = self._plan.teacher.licence
        if self._plan.teacher.citation:
            facts["citation"] = list(self._plan.teacher.citation)
        source = f"escaip {__version__} distil {self._plan.name}: {teacher.get('version', teacher['calculator'])}"
        for part, members in divided.items():
            if members:
                with StoreWriter(folder / part, source=source, overwrite=True, facts=facts) as writer:
                    for data in self._frames(members):
                        writer.write(data)
        write_json(marker, {"digest": digest})
        return folder

    def _part(self, job: Job) -> str:
        hold_out, structure = self._plan.hold_out, job.structure
        # Frames that a run of the student led to go where the run goes.
        unit = structure.group if hold_out.by == "base" else structure.name.partition("~")[0]
        draw = generator(self._plan.seed, "part", unit).random()
        return "test" if draw < hold_out.test else "val" if draw < hold_out.test + hold_out.val else "train"

    def _frames(self, jobs: Iterable[Job]) -> Iterator[AtomicData]:
        for job in jobs:
            for index, atoms in enumerate(frames_of(job, self._log[job.key])):
                name = f"{job.structure.name}:{index}"
                yield AtomicData.from_ase(atoms, structure_id=name, group=job.structure.group)

    def round(self, number: int) -> float:
        """Trains a committee, runs it, labels what it disagrees on; returns the share of surprising frames."""
        rounds, stage = self._plan.rounds, f"round-{number}"
        data = self.store(stage)
        self._say(f"round {number + 1}: training {rounds.members} members for {rounds.steps} steps")
        with ThreadPoolExecutor(min(self._workers, rounds.members)) as pool:
            trained = [pool.submit(self._train, data, f"{stage}-{m}", rounds.steps, m) for m in range(rounds.members)]
            try:
                models = [one.result() for one in trained]
            except BaseException:
                self._ended = True  # so that the other trainings are not waited for
                raise
        student = Labeler(
            "escaip.calculators:EScAIPCalculator", {"model": str(models[0].absolute())},
            max_force=self._teacher.max_force, max_stress=self._teacher.max_stress, timeout=self._teacher.timeout,
        )  # fmt: skip
        log, by = LabelLog(self._folder / "labels" / f"{stage}.jsonl"), sha256(models[0])
        jobs = [
            job for name, entry in rounds.dynamics.items() for job in self._dynamics(name, entry, number + 1, model=by)
        ]  # fmt: skip
        self._run(student, jobs, log, f"round {number + 1}, dynamics of the student")
        answers = [(job, log[job.key]) for job in jobs]
        broken = sum(1 for _, answer in answers if answer.get("error") or answer.get("ended"))
        found = [(job, k, one) for job, answer in answers for k, one in enumerate(frames_of(job, answer))]
        found = [(job, index, atoms) for job, index, atoms in found if find_contact(atoms) is None]
        share, chosen = broken / max(len(jobs), 1), list[int]()
        if found:
            scores = score_frames([atoms for *_, atoms in found], models)
            limit = rounds.surprise * self._usual_spread(data, models)
            spreads = scores.forces_spread
            candidates = np.flatnonzero(np.isfinite(spreads) & (spreads > limit))
            share = (len(candidates) + broken) / (len(found) + broken)
            chosen = select_frames(scores, rounds.add, candidates)[0].tolist() if len(candidates) else []
            self._say(
                f"round {number + 1}: {len(candidates)} of {len(found)} frames have a force spread above {limit:.3g} "
                f"eV/Å, {broken} of {len(jobs)} runs broke; {len(chosen)} frames are labelled"
            )
        wanted = []
        for index in chosen:
            job, frame, atoms = found[index]
            name = f"{job.structure.name}~{stage}.{frame}"
            bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=job.structure.atoms.info)
            wanted.append(Job(Structure(name, job.structure.group, bare), "label"))
        if wanted:
            self._label(f"round {number + 1}", wanted)
        self._shares.append(share)
        return share

    @staticmethod
    def _usual_spread(data: Path, models: Sequence[Path]) -> float:
        """Returns the force spread that 95 % of the validation frames stay below, eV/Å."""
        store = Store(data / "val")
        some = np.unique(np.linspace(0, len(store) - 1, min(len(store), _VALIDATED)).round().astype(int))
        frames = [store[int(index)].to_ase() for index in some]
        return float(np.quantile(score_frames(frames, models).forces_spread, 0.95))

    def _train(self, data: Path, stage: str, steps: int, seed: int) -> Path:
        """Trains on prepared stores, from the last checkpoint where there is one; returns the best checkpoint."""
        student, folder = self._plan.student, self._folder / "training" / stage
        made = json.loads((data / "made.json").read_text(encoding="utf-8"))
        config = config_path(student.config)
        digest = _digest(made, steps, seed, student.options, read_yaml(config))
        record = folder / "record.json"
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if known.get("digest") != digest:
            if known:
                self._say(f"{stage}: data or options have changed since its training, which begins anew")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(record, {"digest": digest})
        elif "best" in known:
            return folder / known["best"]
        options = {
            "data.train": str(data / "train"), "data.val": str(data / "val"), "data.split": "null",
            "trainer.max_steps": steps, "trainer.max_epochs": -1, "trainer.enable_progress_bar": "false",
            "seed_everything": self._plan.seed + seed, "out": str(folder), "name": "run",
            "model.datasets": f"[{self._plan.name}]", "model.level_of_theory": self._plan.teacher.level_of_theory,
            **student.options,
        }  # fmt: skip
        arguments = [f"--{key}={json.dumps(v) if isinstance(v, dict | list) else v}" for key, v in options.items()]
        if any(folder.glob("run/version_*/last.ckpt")):
            arguments += ["--ckpt_path", "last"]
        self._go_on()
        threads = str(max(1, len(os.sched_getaffinity(0)) // self._workers) if stage != "final" else "")
        self._fit([*COMMAND, "--config", str(config), *arguments], folder / LOG, threads)
        best = max(folder.glob("run/version_*/best.ckpt"), key=lambda path: path.stat().st_mtime)
        write_json(record, {"digest": digest, "best": str(best.relative_to(folder))})
        return best

    def _fit(self, command: Sequence[str], log: Path, threads: str) -> None:
        environment = {**({"OMP_NUM_THREADS": threads} if threads else {}), **os.environ}
        with open(log, "ab") as printed:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                while (status := process.poll()) is None:
                    self._go_on()
                    time.sleep(_POLL)
            except BaseException:
                process.terminate()  # it saves a checkpoint
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
                raise
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise TrainingError(f"{log}: the training ended with status {status}: {lines[-1]}")

    def finish(self) -> Distilled:
        """Trains the potential on everything and writes it with its report."""
        data = self.store("final")
        self._say(f"training for {self._plan.student.steps} steps, see {self._folder / 'training' / 'final' / LOG}")
        best = self._train(data, "final", self._plan.student.steps, 0)
        potential = load_potential(best)
        model = self._folder / f"{self._plan.name}.escaip"
        potential.save(model)
        held = Store(data / ("test" if (data / "test").exists() else "val"))
        groups: dict[str, list[AtomicData]] = {}
        for one in (held[index] for index in range(len(held))):
            groups.setdefault(str(one.structure_id).partition("/")[0], []).append(one)
        errors = {name: _errors(potential, members) for name, members in groups.items()}
        errors["all"] = _errors(potential, [one for members in groups.values() for one in members])
        result = self.result(data, model, errors)
        teacher = json.loads((self._folder / TEACHER).read_text(encoding="utf-8"))
        units = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
        content = {
            "teacher": {**teacher, "level_of_theory": self._plan.teacher.level_of_theory},
            "held_out": held.path.name, "units": units, "errors": errors, "frames": result.frames,
            "left_out": result.left_out, "surprising": self._shares,
        }  # fmt: skip
        write_results(self._folder, {"report.json": content})
        write_file(self._folder / "report.txt", result.summary() + "\n")
        return result

    def result(
        self, data: Path, model: Path | None = None, errors: dict[str, dict[str, float]] | None = None
    ) -> Distilled:
        """Counts frames and failures of all jobs."""
        frames, left_out = Counter[str](), Counter[str]()
        for job in self._jobs:
            answer = self._log[job.key]
            frames[job.structure.name.partition("/")[0]] += len(answer["frames"])
            if answer.get("error"):
                left_out[answer["error"]] += 1
        return Distilled(model, data, dict(frames), dict(left_out), errors or {}, self._shares)


def _errors(potential: Any, structures: Sequence[AtomicData]) -> dict[str, float]:
    report, _ = evaluate(potential, structures)
    found = {"energy": report.energy_per_atom, "forces": report.forces, "stress": report.stress}
    return {name: 1e3 * quantity.errors.mae for name, quantity in found.items() if quantity is not None}


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


if __name__ == "__main__":
    from escaip.train.commands import fit

    sys.exit(run_as_child(lambda: fit(sys.argv[2:])))
