"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Triton reads this when kernels are defined: without a GPU they run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell's job in the background ignores it, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """ASE (3.29) shapes arrays in a way that NumPy deprecates from 2.5 on."""
    config.addinivalue_line("filterwarnings", "ignore:Setting the shape on a NumPy array:DeprecationWarning")


def pytest_collection_finish() -> None:
    """Thousands of collected tests and their imports stay to the end: the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests run side by side on few cores: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_potential() -> Callable[..., Any]:
    """The function of ``tiny.py``, imported here only after the settings above."""
    from tiny import make_potential

    return make_potential


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Returns the path of a file of the real data beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    root = Path(os.environ.get("ESCAIP_SHARED_DATA", default))

    def locate(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real data {name} is not at hand")
        return path

    return locate


@pytest.fixture(scope="session")
def compile_once() -> Callable[..., Any]:
    """``compile_ahead``, which takes half a minute, once for each configuration of a model."""
    from escaip.potential.compile import compile_ahead

    kept: dict[str, tuple[Any, bytes]] = {}

    def write(model: Any, differentiate: bool, path: Path) -> Any:
        key = f"{model.config} {differentiate}"
        if key not in kept:
            kept[key] = compile_ahead(model, differentiate, path), path.read_bytes()
        path.write_bytes(kept[key][1])
        return kept[key][0]

    return write
