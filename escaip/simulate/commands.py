"""The commands ``md``, ``relax``, ``check``, ``select`` and ``analyze``."""

from __future__ import annotations

import math
import pkgutil
import re
import shlex
import sys
import time
from itertools import islice
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Unpack

from escaip.errors import SimulationError, UsageError
from escaip.files import first_line, model_file, resolve, sha256, write_results
from escaip.options import CalculatorOptions, ModelFile, ModelOptions, StructureFile
from escaip.signals import StopSignals, continued_by_same_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms
    from ase.calculators.calculator import BaseCalculator

    from escaip.simulate.ensembles import MDSettings


def relax(
    model: ModelFile,
    structure: StructureFile,
    *,
    fmax: float = 0.05,
    steps: int = 500,
    optimizer: Literal["bfgs", "fire"] = "bfgs",
    cell: bool = False,
    pressure: float = 0.0,
    frame: int | None = None,
    all: bool = False,
    out: str | None = None,
    overwrite: bool = False,
    **options: Unpack[CalculatorOptions],
) -> None:
    """Relaxes a structure, or all of a file, to minima of the energy.

    Args:
        model: a model file
        structure: anything ASE reads
        fmax: largest force at the end, in eV/Å
        steps: give up after this many
        optimizer: algorithm
        cell: relax the cell as well
        pressure: external pressure in GPa, with --cell
        frame: which structure of the file (default: the last)
        all: relax all structures of the file, many at once; the same command continues after a kill
        out: file to write (default: the name of STRUCTURE with .relaxed.extxyz)
        overwrite: with --all, replace what is there

    Example: escaip relax example:organic example:ethanol --fmax 0.01
    """
    from escaip.simulate.output import freeze, read_structure, write_structure
    from escaip.simulate.relaxation import relax as relax_atoms

    path = Path(out or f"{resolve(structure).stem}.relaxed.extxyz")
    settings: dict[str, Any] = {
        "fmax": fmax, "steps": steps, "optimizer": optimizer, "cell": cell, "pressure": pressure,
    }  # fmt: skip
    if all:
        if frame is not None:
            raise UsageError("--all relaxes every frame, --frame one of them: choose one of the two")
        _relax_all(model, structure, path, settings, overwrite, options)
        return
    atoms = read_structure(structure, -1 if frame is None else frame)
    atoms.calc = make_calculator(model, **options)
    result = relax_atoms(atoms, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_structure(path, freeze(result.atoms))
    if not result.converged:
        raise SimulationError(
            f"not converged after {result.steps} steps (largest force {result.largest_force:.4f} eV/Å): the structure "
            f"reached is in {path}: raise --steps, or try --optimizer fire"
        )
    print(result.summary())
    print(f"wrote {path}")


def _relax_all(
    model: str, structure: str, path: Path, settings: dict[str, Any], overwrite: bool, options: CalculatorOptions
) -> None:
    """Relaxes all structures of a file, or what an earlier run has left of them."""
    from tqdm import tqdm

    from escaip.data.readers import data_sha256
    from escaip.evaluate.frames import check_out, write_frames
    from escaip.simulate.output import freeze, read_structures, read_trajectory
    from escaip.simulate.relaxation import relax_all

    check_out(path, overwrite)
    if "d3" in options:
        raise UsageError("--d3 is evaluated for one structure at a time: leave --all or --d3 out")
    calculator: Any = make_calculator(model, **options)
    models = [model, *options.get("committee", ())]
    run: dict[str, Any] = {
        "command": "relax", **settings, **options, "model": [sha256(model_file(name)) for name in models],
        "data": data_sha256(structure),
    }  # fmt: skip
    for name in ("device", "committee", "compile"):
        run.pop(name, None)

    def remaining(count: int) -> Iterator[Atoms]:
        rest = map(calculator.with_state, islice(read_structures(structure), count, None))
        results = relax_all(calculator.potentials, rest, first=count, **settings)
        for result in tqdm(results, initial=count, unit="structure", disable=not sys.stderr.isatty()):
            frame = freeze(result.atoms)
            frame.info.update(calculator.origin, converged=result.converged)
            yield frame

    with continued_by_same_command():
        count = write_frames(path, run, remaining, overwrite=overwrite)
    missing = [str(index) for index, frame in enumerate(read_trajectory(path)) if not frame.info["converged"]]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise SimulationError(
            f"{len(missing)} of {count} structures did not converge in {settings['steps']} steps (frames {shown}): "
            f"those reached are in {path}, with converged=F: raise --steps, or try --optimizer fire"
        )
    print(f"converged: {count} structures")
    print(f"wrote {path}")


def md(
    model: ModelFile,
    structure: StructureFile,
    *,
    ensemble: Literal["nve", "nvt", "npt"] = "nvt",
    steps: int | None = None,
    temperature: float = 300.0,
    timestep: float | None = None,
    pressure: float | None = None,
    thermostat: Literal["langevin", "bussi", "nose-hoover"] | None = None,
    thermostat_time: float = 100.0,
    barostat: Literal["isotropic", "full"] | None = None,
    barostat_time: float = 1000.0,
    velocities: Literal["auto", "draw", "keep"] = "auto",
    seed: int = 0,
    interval: int = 10,
    trajectory_interval: int | None = None,
    restart_interval: int = 1000,
    max_time: str | None = None,
    frame: int = -1,
    out: str = "md.extxyz",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    graph_skin: float = 0.0,
    cuda_graphs: bool = False,
    max_spread: float | None = None,
    save_spread: float | None = None,
    **options: Unpack[CalculatorOptions],
) -> None:
    """Runs molecular dynamics with a log, a trajectory and a restart file.

    Args:
        model: a model file
        structure: anything ASE reads
        ensemble: constant energy, temperature, or temperature and pressure
        steps: steps of the whole run, resumed parts included (default: 2000, or those of the run that is resumed)
        temperature: temperature in K, of the thermostat and of velocities that are drawn
        timestep: time step in fs (default: 0.5 with atoms lighter than 6 u, 1 with atoms lighter than 24 u, else 2)
        pressure: pressure in GPa, npt only (default: 0)
        thermostat: nvt only (default: langevin)
        thermostat_time: relaxation time of the thermostat in fs
        barostat: npt only (default: isotropic)
        barostat_time: relaxation time of the barostat in fs
        velocities: auto keeps those in the file and draws them where there are none
        seed: seed of velocities and thermostat
        interval: steps between lines of the log
        trajectory_interval: steps between frames (default: as --interval)
        restart_interval: steps between restart files
        max_time: wall time after which the run writes its restart file and ends, as HH:MM:SS or D-HH:MM:SS
        frame: which structure of the file (default: the last)
        out: trajectory, .extxyz or .traj; the log and the restart file go beside it
        resume: continue the run in --out from its restart file
        overwrite: replace the files of --out
        quiet: print no progress line
        graph_skin: keep the graph while distances change by less than this many Å; 0.3 for small systems on a GPU
        cuda_graphs: with --compile, on CUDA, launch each evaluation as one graph
        max_spread: with --committee, stop where the members' forces on an atom differ by more, in eV/Å
        save_spread: with --committee, write frames above it, in eV/Å, to OUT.uncertain.extxyz and go on

    Example: escaip md example:organic example:ethanol
    """
    from escaip.simulate.ensembles import MDSettings, default_timestep
    from escaip.simulate.md import ProgressLine, RunFiles
    from escaip.simulate.output import check_trajectory_name, read_structure
    from escaip.simulate.restart import RestartState

    # Mistyped numbers and names are reported before the model is loaded.
    end = time.monotonic() + parse_max_time(max_time)
    check_trajectory_name(Path(out))
    if resume and overwrite:
        raise UsageError("--resume continues the run in --out, --overwrite replaces it: choose one of them")
    atoms = read_structure(structure, frame)
    if steps is None:
        steps = RestartState.load(RunFiles.beside(Path(out)).restart).target if resume else 2000
    settings = MDSettings(
        ensemble=ensemble, steps=steps, timestep=default_timestep(atoms) if timestep is None else timestep,
        temperature=temperature, pressure=pressure, thermostat=thermostat, thermostat_time=thermostat_time,
        barostat=barostat, barostat_time=barostat_time, velocities=velocities, seed=seed, log_interval=interval,
        trajectory_interval=trajectory_interval or interval, restart_interval=restart_interval, max_spread=max_spread,
        save_spread=save_spread,
    )  # fmt: skip
    atoms.calc = make_calculator(model, graph_skin=graph_skin, cuda_graphs=cuda_graphs, **options)
    report = None if quiet else ProgressLine()
    _run_until(end, atoms, settings, out=out, resume=resume, overwrite=overwrite, report=report)


def _run_until(end: float, atoms: Atoms, settings: MDSettings, **options: Any) -> None:
    """Runs to the last step, to a signal or to the time ``end`` and prints results and the command that continues."""
    from escaip.simulate.md import run_md

    signals = StopSignals(SIGINT, SIGTERM)

    def stop() -> bool:
        return signals.received is not None or time.monotonic() >= end

    with signals:
        result = run_md(atoms, settings, stop=stop, **options)
    print(result.summary())
    if result.steps < settings.steps:
        why = "time limit" if signals.received is None else signals.received.name
        command = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        print(f"{why}: stopped at step {result.steps} of {settings.steps}; continue with")
        print(shlex.join(["escaip", *command, "--resume"]))
    if signals.received is not None:
        raise SystemExit(128 + signals.received)


def parse_max_time(text: str | None) -> float:
    """Returns the seconds that ``HH:MM:SS`` or ``D-HH:MM:SS`` means; raises UsageError for anything else."""
    if text is None:
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UsageError(f"--max-time is {text!r}: write it as HH:MM:SS or D-HH:MM:SS, such as 01:30:00")
    return total


def check(
    model: ModelFile | None = None,
    *,
    calculator: str | None = None,
    python: str | None = None,
    structure: list[StructureFile] | None = None,
    frame: int = -1,
    seed: int = 0,
    temperature: float = 300.0,
    elements: list[str] | None = None,
    out: str | None = None,
    graph_skin: float = 0.0,
    cuda_graphs: bool = False,
    **options: Unpack[CalculatorOptions],
) -> None:
    """Compares a potential with what physics demands: forces as derivatives, symmetries, smoothness, conservation.

    Args:
        model: a model file
        calculator: instead of MODEL, module:NAME of any ASE calculator; a class or a function without arguments
        python: another Python that has the calculator and ASE (default: this one)
        structure: structures to test around, anything ASE reads (default: a molecule and a crystal, where possible)
        frame: which structure of each file (default: the last)
        seed: seed of displacements and velocities
        temperature: temperature of the test of conservation in K
        elements: elements whose pairs must have no hole (default: known ones, for information)
        out: a JSON file for the results
        graph_skin: keep the graph while distances change by less than this many Å
        cuda_graphs: with --compile, on CUDA, launch each evaluation as one graph

    Example: escaip check example:organic --dtype float64
    """
    if (model is None) == (calculator is None):
        raise UsageError("give either MODEL or --calculator module:NAME")
    if python is not None and calculator is None:
        raise UsageError("--python is for --calculator: leave it out")
    from escaip.calculators import RemoteCalculator
    from escaip.files import write_json
    from escaip.simulate.check import check_calculator, check_pairs, default_structures, pair_elements
    from escaip.simulate.output import read_structure

    if model is not None:
        made = make_calculator(model, graph_skin=graph_skin, cuda_graphs=cuda_graphs, **options)
    else:
        made = RemoteCalculator(str(calculator), python=python) if python else import_calculator(str(calculator))
    structures = [read_structure(path, frame) for path in structure or ()] or default_structures(made)
    reports = [check_calculator(made, atoms, seed=seed, temperature=temperature) for atoms in structures]
    pairs = check_pairs(made, elements or pair_elements(made, structures), demanded=elements is not None)
    reports.append(pairs)
    print("\n\n".join(report.table() for report in reports))
    if out is not None:
        write_json(out, {"calculator": model or calculator, "reports": [report.to_dict() for report in reports]})
    for report in reports:
        report.raise_failed()


def select(
    trajectory: StructureFile,
    *,
    committee: list[ModelFile],
    count: int,
    out: str,
    min_spread: float = 0.0,
    max_spread: float | None = None,
    min_distance: float = 0.005,
    every: int = 1,
    max_atoms: int | None = None,
    **options: Unpack[ModelOptions],
) -> None:
    """Selects frames to label next: those on which the members of a committee disagree.

    Args:
        trajectory: anything ASE reads
        committee: two or more model files
        count: frames to choose, at most
        out: a name that ends in .extxyz; a .json of spreads goes beside it
        min_spread: leave out frames with a smaller spread of forces, in eV/Å
        max_spread: leave out frames with a larger spread, which are broken rather than new, in eV/Å
        min_distance: frames nearer to a chosen one are duplicates; a difference of atomic energies in eV
        every: look at every N-th frame
        max_atoms: atoms evaluated at once (default: what is fastest)

    Example: escaip select run.extxyz --committee a.ckpt b.ckpt c.ckpt --count 50 --out new.extxyz
    """
    from escaip.simulate.select import select_file

    selection = select_file(
        trajectory, committee, out, count=count, min_spread=min_spread, max_spread=max_spread,
        min_distance=min_distance, every=every, max_atoms=max_atoms, progress=sys.stderr.isatty(), **options,
    )  # fmt: skip
    print(selection.summary())


def analyze(
    trajectory: StructureFile,
    *,
    quantities: list[str] | None = None,
    out: str = "analysis",
    timestep: float | None = None,
    start: int = 0,
    stop: int | None = None,
    every: int = 1,
    log: str | None = None,
    rmax: float | None = None,
    bin_width: float = 0.05,
    fit: tuple[float, float] | None = None,
    unwrap: bool = True,
    vacf_length: float | None = None,
    plots: bool = True,
) -> None:
    """Analyses a trajectory: structure, diffusion, vibrations and averages.

    Args:
        trajectory: anything ASE reads
        quantities: some of rdf, msd, vacf, density, temperature, pressure, drift (default: all that the file allows)
        out: folder for analysis.json and plots
        timestep: time between frames of the file in fs, where the file does not say
        start: first frame, from 0
        stop: frame to stop before (default: the end)
        every: take every N-th frame
        log: log of the run (default: the .csv beside TRAJECTORY)
        rmax: range of rdf in Å (default: half the smallest width of the cell, at most 10)
        bin_width: bin width of rdf in Å
        fit: lags in fs between which diffusion is fitted (default: 0.1 to 0.5 of a block)
        unwrap: follow atoms across cell boundaries for msd
        vacf_length: longest lag of vacf in fs (default: half the run, at most 5000)
        plots: draw the quantities

    Example: escaip analyze md.extxyz --quantities rdf msd
    """
    from escaip.simulate.report import AnalysisSettings
    from escaip.simulate.report import analyze as analyze_trajectory

    chosen = None if quantities is None else tuple(n for item in quantities for n in item.split(",") if n)
    settings = AnalysisSettings(
        quantities=chosen, start=start, stop=stop, every=every, timestep=timestep, log=log, r_max=rmax,
        bin_width=bin_width, fit=fit, unwrap=unwrap, vacf_length=vacf_length,
    )  # fmt: skip
    analysis = analyze_trajectory(trajectory, settings, progress=sys.stderr.isatty())
    files: dict[str, Any] = {"analysis.json": analysis.to_dict()}
    if plots:
        from escaip.simulate.plots import draw

        files |= {f"{name}.png": figure for name, figure in draw(analysis).items()}
    write_results(out, files)
    print(analysis.table())
    print(f"wrote {out}")


def make_calculator(
    model: str, *, committee: list[str] | None = None, d3: str | None = None, d3_damping: str = "bj", **options: Any
) -> BaseCalculator:
    """Returns the calculator that command-line options describe; further options are those of ``EScAIPCalculator``."""
    from escaip.calculators import CommitteeCalculator, DispersionCalculator, EScAIPCalculator

    if committee:
        made: BaseCalculator = CommitteeCalculator([model, *committee], **options)
    else:
        made = EScAIPCalculator(model, **options)
    return made if d3 is None else DispersionCalculator(made, d3, d3_damping)


def import_calculator(name: str) -> BaseCalculator:
    """Returns the ASE calculator that ``module:NAME`` names, imported from here or from the current folder.

    Raises:
        UsageError: no such module or name, or it makes no calculator.
    """
    from ase.calculators.calculator import BaseCalculator

    sys.path.insert(0, "")
    try:
        made = pkgutil.resolve_name(name)
        if not isinstance(made, BaseCalculator):
            made = made()
    except Exception as error:  # somebody else's module raises anything
        raise UsageError(
            f"--calculator {name}: {first_line(error)}: name a class or function as module:NAME"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(made, BaseCalculator):
        raise UsageError(f"--calculator {name} is no ASE calculator: name a class or function that makes one")
    return made
