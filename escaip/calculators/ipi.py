"""A potential as the force of an i-PI simulation, over its socket (docs/engines.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ase import Atoms
from ase.calculators.socketio import SocketClient, actualunixsocketname

from escaip.errors import ConfigError, SimulationError


def run_ipi(settings: str | os.PathLike[str], atoms: Atoms, *, wait: float = 60.0) -> None:
    """Starts i-PI with an input file, answers what it asks for, and returns when it has ended.

    i-PI moves the atoms; ``atoms``, which is moved along, says what they are, its calculator what they feel. i-PI
    writes into the present folder, and what it prints into the input's name with ``.log``. Charge and spin are those
    of ``atoms.info``.

    Args:
        settings: i-PI's input, with one ``<ffsocket mode='unix'>``; the socket gets a name of its own, so that runs do
            not meet.
        atoms: with a calculator; periodic axes decide whether i-PI is sent a virial, and whether there is a cell.
        wait: seconds within which i-PI must have opened its socket.

    Raises:
        ConfigError: i-PI is missing, the input file cannot be read, or it has no such socket.
        SimulationError: i-PI stopped with an error; the message is the last line that it printed.
        EscaipError: whatever stopped the potential; i-PI is ended then.
    """
    settings = Path(settings)
    address = _address(settings)
    command = _command()
    log = Path(f"{settings.name}.log")
    # ASE puts its own prefix before a name, i-PI the one it is told.
    name = f"escaip_{os.getpid()}_{address}"
    prefix = actualunixsocketname(name).removesuffix(address)
    path = Path(actualunixsocketname(name))
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen([*command, "-S", prefix, str(settings)], stdout=stream, stderr=subprocess.STDOUT)
        try:
            _wait_for(path, process, wait, log)
            client = SocketClient(unixsocket=name)
            client.run(atoms, use_stress=bool(atoms.pbc.any()))
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            path.unlink(missing_ok=True)
    if status != 0:
        raise SimulationError(f"i-PI stopped ({_last_line(log)}): {log} has more")


def _command() -> Sequence[str]:
    beside = Path(sys.executable).with_name("i-pi")
    found = str(beside) if beside.exists() else shutil.which("i-pi")
    if found is None:
        raise ConfigError("i-PI is not installed: pip install ipi")
    return [sys.executable, found] if found == str(beside) else [found]


def _address(settings: Path) -> str:
    try:
        root = ElementTree.parse(settings).getroot()
    except OSError as error:
        raise ConfigError(f"i-PI input {settings} cannot be read: {error.strerror or error}") from error
    except ElementTree.ParseError as error:
        raise ConfigError(f"i-PI input {settings} is no XML ({error}): repair it") from error
    sockets = [found for found in root.iter("ffsocket") if found.get("mode", "").strip() == "unix"]
    address = (sockets[0].findtext("address") or "").strip() if len(sockets) == 1 else ""
    if not address:
        raise ConfigError(
            f"i-PI input {settings} has {len(sockets)} unix sockets with an address: give one, "
            "<ffsocket mode='unix' name='escaip'> <address> escaip </address> </ffsocket>"
        )
    return address


def _wait_for(path: Path, process: subprocess.Popen[bytes], wait: float, log: Path) -> None:
    """Until i-PI has opened its socket."""
    end = time.monotonic() + wait
    while not path.exists():
        if process.poll() is not None:
            raise SimulationError(f"i-PI did not start ({_last_line(log)}): {log} has more")
        if time.monotonic() > end:
            raise SimulationError(f"i-PI opened no socket within {wait:g} s: {log} says how far it came")
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "without a word"
