"""The wheel, installed away from the checkout: a working command with its recipes, cards and decks."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import escaip

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The build backend is among the development tools: nothing is downloaded.
    done = subprocess.run(
        [*build, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a fresh environment, from a folder with nothing in it."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "env"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # Dependencies are lent by the environment of the tests; a path file inside it (the checkout's) does not count here.
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    (site / "lent.pth").write_text("\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})))
    empty = folder / "empty"
    empty.mkdir()
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(program: str, *arguments: str, status: int = 0) -> str:
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_package_and_its_resources_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    resources = "escaip/_resources"
    expected = {
        "escaip/py.typed", "escaip/cli.py", f"{resources}/configs/quickstart.yaml",
        f"{resources}/datasets/spice/README.md", f"{resources}/datasets/spice/manifest.toml",
        f"{resources}/datasets/spice/sample.hdf5", f"{resources}/md/structures/ethanol.xyz",
        f"{resources}/md/potentials/organic.escaip",
    }  # fmt: skip
    assert expected <= set(names)
    assert [name for name in names if "__pycache__" in name or "/." in name] == []
    assert {name.split("/")[0] for name in names} == {"escaip", f"escaip-{escaip.__version__}.dist-info"}
    assert wheel.stat().st_size < 10_000_000  # of which two example potentials are 6.5


def test_the_command_works_away_from_the_checkout(run: Run) -> None:
    assert "site-packages" in run("python", "-c", "import escaip; print(escaip.__file__)")
    assert run("escaip", "--version").strip() == f"escaip {escaip.__version__}"
    assert "spice" in run("escaip", "data", "list")
    assert run("escaip", "data", "info", "spice").startswith("#")


def test_recipe_and_sample_are_found_away_from_the_checkout(run: Run) -> None:
    assert "dataset:spice/sample.hdf5" in run("escaip", "fit", "--config", "quickstart", "--print_config")
    assert "1536" in run("escaip", "data", "inspect", "dataset:spice/sample.hdf5").replace(",", "").replace(" ", "")


@pytest.mark.bad_input
def test_an_unknown_recipe_is_named_away_from_the_checkout(run: Run) -> None:
    run("escaip", "fit", "--config", "nothing", status=2)
