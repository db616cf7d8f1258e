"""MACE small on a set of the bench: as many epochs as fit given CPU seconds, and its predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from peers.environments import default_folder, interpreter
from peers.workers import Worker

from escaip.data import AtomicData, Store

SCRIPT = Path(__file__).resolve().parents[1] / "peers/adapters/mace_predict.py"
AT_ONCE = 16  # structures


def command(python: Path, seed: int, epochs: int, part: str) -> list[str]:
    """The example of MACE's README: its weights of energy and forces by default, stage two in the last quarter.

    r_max 5 Å, EMA 0.99, amsgrad. Small: 128x0e; ScaleShiftMACE, which begins at the mean energy; batches of 5 (10 by
    default), more steps in a short time; float32, by its README usually twice as fast. No stress.
    """
    second = max(1, min(round(0.75 * epochs), epochs - 1))
    return [
        str(python), "-m", "mace.cli.run_train", "--name", part, "--seed", str(seed), "--train_file", f"{part}.extxyz",
        "--valid_file", "val.extxyz", "--energy_key", "energy", "--forces_key", "forces", "--E0s", "average",
        "--model", "ScaleShiftMACE", "--hidden_irreps", "128x0e", "--r_max", "5.0", "--scaling", "rms_forces_scaling",
        "--batch_size", "5", "--valid_batch_size", "10", "--lr", "0.01", "--amsgrad", "--ema", "--ema_decay", "0.99",
        "--swa", "--start_swa", str(second), "--max_num_epochs", str(epochs), "--eval_interval", "1",
        "--default_dtype", "float32", "--device", "cpu", "--plot", "False", "--pin_memory", "False",
    ]  # fmt: skip


def train(
    stores: dict[str, Path], folder: Path, seed: int, seconds: float, child: Callable[[list[str], Path, Path], float]
) -> float:
    """Trains in ``folder`` and returns the CPU seconds it took; one epoch and three on a quarter say what fits.

    Args:
        stores: of the training and the validation part.
        folder: for all its files; the models have ``train`` in their names.
        seed: of its command.
        seconds: CPU time it may take.
        child: runs a command with a log in a folder, and returns its CPU seconds.
    """
    python = interpreter("mace", default_folder())
    train = list(Store(stores["train"]))
    for name, structures in (("train", train), ("quarter", train[::4]), ("val", Store(stores["val"]))):
        ase.io.write(folder / f"{name}.extxyz", [labelled(one) for one in structures], format="extxyz")
    once, thrice = (
        child(command(python, seed, epochs, "quarter"), folder / "quarter.log", folder) for epochs in (1, 3)
    )
    epoch = (thrice - once) / 2 * len(train) / len(train[::4])
    epochs = max(2, round((seconds - (3 * once - thrice) / 2) / epoch))
    return child(command(python, seed, epochs, "train"), folder / "fit.log", folder)


def labelled(data: AtomicData) -> Atoms:
    """With energy and forces as its only labels."""
    atoms = bare(data)
    atoms.calc = SinglePointCalculator(atoms, energy=float(data.energy), forces=data.forces.double().numpy())
    return atoms


def bare(structure: AtomicData | Atoms) -> Atoms:
    atoms = structure if isinstance(structure, Atoms) else structure.to_ase()
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


class TrainedMACE:
    """What the bench asks of a potential; the model runs in a process of its environment.

    Args:
        folder: where ``train`` left its models; that of stage two counts.
        elements: that it knows.
    """

    def __init__(self, folder: Path, elements: Sequence[int]) -> None:
        python = interpreter("mace", default_folder())
        arguments = str(folder / "train_stagetwo.model")
        self.worker = Worker(python, arguments, folder / "predict.log", {"OMP_NUM_THREADS": "1"}, script=SCRIPT)
        self.metadata = SimpleNamespace(elements=tuple(elements))
        self.parameters = 0

    def predict(self, structures: Iterable[AtomicData | Atoms]) -> list[SimpleNamespace]:
        """Energies, eV, and forces, eV/Å."""
        waiting, found = [bare(one) for one in structures], []
        for start in range(0, len(waiting), AT_ONCE):
            group = [
                {"numbers": one.numbers.tolist(), "positions": one.positions.tolist(),
                 "cell": one.cell.tolist(), "pbc": one.pbc.tolist()} for one in waiting[start : start + AT_ONCE]
            ]  # fmt: skip
            reply = self.worker.ask("predict", structures=group)
            self.parameters = reply["parameters"]
            for energy, forces in zip(reply["energies"], reply["forces"], strict=True):
                found.append(SimpleNamespace(energy=energy, forces=np.array(forces)))
        return found

    def errors(self, structures: Sequence[AtomicData]) -> dict[str, float]:
        """Mean absolute errors in meV/atom and meV/Å."""
        found = self.predict(structures)
        pairs = list(zip(found, structures, strict=True))
        energies = [abs(one.energy - float(data.energy)) / data.num_nodes for one, data in pairs]
        forces = [np.abs(one.forces - data.forces.double().numpy()).ravel() for one, data in pairs]
        return {"energy": 1e3 * float(np.mean(energies)), "forces": 1e3 * float(np.mean(np.concatenate(forces)))}
