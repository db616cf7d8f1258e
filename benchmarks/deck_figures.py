"""Draws results/images from what ``properties.py`` and ``deck_runs.py`` found: a picture for each deck.

python benchmarks/deck_figures.py [--properties FILE] [--decks FILE] [--out benchmarks/results/images] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from escaip.properties.common import MODEL, MUTED, new_figure

BENCHMARKS = Path(__file__).resolve().parent
TEACHER, RED, GREEN, LIGHT = "#303030", "#c8553d", "#588157", "#a9c6d9"
TITLES = {"copper": "copper (EMT)", "argon": "argon (Lennard-Jones)"}
THERMOSTATS = {"langevin": "Langevin", "bussi": "Bussi", "nose-hoover": "Nosé–Hoover chain"}
Curves = dict[str, Any]


def array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=float)


def panels(count: int, width: float = 4.4, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    figure = new_figure(count, width, height)
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_equation_of_state(studies: Curves) -> Figure:
    figure, axes = panels(2)
    for axis, (name, study) in zip(axes, studies.items()):
        for of, style in (("teacher", {"color": TEACHER, "marker": "o", "fillstyle": "none", "linewidth": 0}),
                          ("learned", {"color": MODEL, "linewidth": 1.4})):  # fmt: skip
            curve = study[of]["curves"]["equation_of_state"]
            volumes, energies = array(curve["volumes_A3/atom"]), array(curve["energies_eV/atom"])
            if of == "learned":
                fit = np.polynomial.Polynomial.fit(volumes, energies, 4)
                volumes = np.linspace(volumes[0], volumes[-1], 200)
                energies = fit(volumes)
            axis.plot(volumes, 1e3 * (energies - energies.min()), label=of, **style)
        modulus = [study[of]["values"]["B0 (GPa)"] for of in ("teacher", "learned")]
        text = f"$B_0$ {modulus[0]:.4g} GPa, learned {modulus[1]:.4g} GPa"
        axis.set(title=TITLES[name], xlabel="volume (Å³/atom)", ylabel="energy above the minimum (meV/atom)")
        axis.text(0.5, 0.93, text, transform=axis.transAxes, ha="center", va="top")
        axis.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.7))
    return figure


def draw_elastic(studies: Curves) -> Figure:
    figure, axes = panels(2, height=3.2)
    names = ("C11 (GPa)", "C12 (GPa)", "C44 (GPa)", "B0 (GPa)")
    for axis, (name, study) in zip(axes, studies.items()):
        place = np.arange(len(names))
        truth, learned = (array([study[of]["values"][key] for key in names]) for of in ("teacher", "learned"))
        axis.bar(place - 0.2, truth, 0.38, color=MUTED, label="teacher")
        axis.bar(place + 0.2, learned, 0.38, color=MODEL, label="learned")
        for x, value, share in zip(place, np.maximum(truth, learned), learned / truth - 1):
            text = f"{100 * share:+.1f} %".replace("-", "−")
            axis.annotate(text, (x, value), (0, 3), textcoords="offset points", ha="center")
        axis.set_xticks(place, ["$C_{11}$", "$C_{12}$", "$C_{44}$", "$B_0$"])
        axis.set(title=TITLES[name], ylabel="GPa", ylim=(0, 1.25 * max(truth.max(), learned.max())))
    axes[0].legend(frameon=False, loc="upper right", ncols=2)
    return figure


def draw_phonons(studies: Curves) -> Figure:
    figure, axes = panels(2, width=5.2)
    for axis, (name, study) in zip(axes, studies.items()):
        for of, key, color, style, width, label in (
            ("teacher", "phonons", TEACHER, "-", 2.4, "teacher"),
            ("learned", "phonons", "#4aa3d9", "--", 1.4, "learned, 0.03 Å"),
            ("learned", "phonons_small", RED, ":", 1.0, "learned, 0.01 Å"),
        ):
            bands = study[of]["curves"][key]
            # Lattice constants differ by a little, and so do lengths in reciprocal space.
            length = bands["distances_1/A"][-1]
            for index, branch in enumerate(bands["branches_THz"]):
                axis.plot(array(bands["distances_1/A"]) / length, branch, style, color=color, linewidth=width,
                          label=None if index else label)  # fmt: skip
        ticks: dict[float, str] = {}
        for place, label in zip(bands["label_distances_1/A"], bands["labels"]):
            label = label.replace("G", "Γ")
            ticks[place / length] = f"{ticks[place / length]}|{label}" if place / length in ticks else label
        axis.set_xticks(list(ticks), list(ticks.values()))
        for place in ticks:
            axis.axvline(place, color=MUTED, linewidth=0.5, zorder=0)
        axis.axhline(0, color=MUTED, linewidth=0.5, zorder=0)
        axis.set(title=TITLES[name], xlim=(0, 1), ylim=(None, 1.12 * axis.get_ylim()[1]), ylabel="frequency (THz)")
    axes[0].legend(frameon=False, loc="upper right", ncols=3, columnspacing=1.0)
    return figure


def draw_neb(studies: Curves) -> Figure:
    figure, axes = panels(2, height=3.2)
    for axis, (name, study) in zip(axes, studies.items()):
        for of, color, style in (("teacher", TEACHER, "-o"), ("learned", MODEL, "--s")):
            path = study[of]["curves"]["vacancy_hop"]
            barrier = study[of]["values"]["vacancy hop (eV)"]
            axis.plot(path["distances_A"], 1e3 * array(path["energies_eV"]), style, color=color, markersize=4,
                      linewidth=1.2, label=f"{of}, {1e3 * barrier:.4g} meV")  # fmt: skip
        axis.set(title=TITLES[name], xlabel="path (Å)", ylabel="energy (meV)")
        axis.set_ylim(None, 1.45 * axis.get_ylim()[1])
        axis.legend(frameon=False, loc="upper right", title="barrier")
    return figure


def draw_radial(studies: Curves) -> Figure:
    figure, axes = panels(2)
    for axis, (name, study) in zip(axes, studies.items()):
        teacher = study["teacher"]["curves"]["radial"]
        learned = study["learned"]["curves"]["radial"]
        again = study["teacher_again"]["curves"]["radial"]
        key = next(key for key in study["learned"]["values"] if "g_teacher" in key)
        off, noise = study["learned"]["values"][key], study["teacher"]["values"][key]
        distance, g = array(teacher["distance_A"]), array(teacher["g"])
        axis.plot(distance, g, color=TEACHER, linewidth=2.4, label="teacher")
        axis.plot(distance, learned["g"], "--", color="#4aa3d9", linewidth=1.4, label="learned")
        for run, shift, color, label in (
            (learned, -1.5, MODEL, f"learned − teacher ({off:.1f} %), × 5"),
            (again, -3.0, RED, f"teacher, another seed ({noise:.1f} %), × 5"),
        ):
            axis.plot(distance, 5 * (array(run["g"]) - g) + shift, color=color, linewidth=1.0, label=label)
        for shift in (0, -1.5, -3.0):
            axis.axhline(shift, color=MUTED, linewidth=0.5, zorder=0)
        axis.set(title=TITLES[name], xlabel="r (Å)", ylabel="g(r)", xlim=(0.55 * distance[-1] * 0.7, distance[-1]))
        axis.set_yticks(np.arange(0, g.max() + 1, 2))
        axis.set_ylim(None, 1.75 * g.max())
        axis.legend(frameon=False, loc="upper right")
    return figure


def draw_nve(deck: Curves) -> Figure:
    curves, (figure, (left, right)) = deck["curves"], panels(2)
    atoms = curves["num_atoms"]
    for name, color in (("conservative, 0.5 fs", MODEL), ("direct, 0.5 fs", RED)):
        run = curves[name]
        left.plot(run["time_ps"], 1e3 * array(run["total_energy_change_eV"]) / atoms, color=color,
                  linewidth=1.4, label=name.split(",")[0])  # fmt: skip
    left.set(xlabel="time (ps)", ylabel="total energy change (meV/atom)", title="3BPA, time step 0.5 fs")
    left.legend(frameon=False, loc="upper left")
    for name, color in (("conservative, 0.5 fs", MODEL), ("conservative, 0.25 fs", GREEN)):
        run = curves[name]
        label = f"{name.split(', ')[1]}: fluctuation {run['fluctuation_meV/atom']:.2g} meV/atom"
        right.plot(run["time_ps"], 1e3 * array(run["total_energy_change_eV"]) / atoms, color=color, linewidth=0.8,
                   label=label)  # fmt: skip
    low, high = right.get_ylim()
    right.set(xlabel="time (ps)", ylabel="total energy change (meV/atom)", title="conservative forces, two time steps")
    right.set_ylim(low, high + 0.35 * (high - low))
    right.legend(frameon=False, loc="upper right")
    return figure


def draw_nvt(deck: Curves) -> Figure:
    curves, (figure, axes) = deck["curves"], panels(3, width=3.4, height=3.1)
    for axis, (name, title) in zip(axes, THERMOSTATS.items()):
        time, temperature = array(curves[name]["time_ps"]), array(curves[name]["temperature_K"])
        mean = np.cumsum(temperature) / np.arange(1, len(temperature) + 1)
        axis.plot(time, temperature, color=LIGHT, linewidth=0.8, label="temperature")
        axis.plot(time, mean, color=MODEL, linewidth=1.8, label="mean so far")
        axis.axhline(curves["temperature_K"], color=TEACHER, linewidth=0.9, linestyle="--", label="asked for")
        axis.set(title=title, xlabel="time (ps)", ylim=(0, 620))
    axes[0].set(ylabel="temperature (K)")
    axes[0].legend(frameon=False, loc="lower right", ncols=1)
    return figure


def smooth(values: Any, count: int) -> np.ndarray:
    """Means over ``count`` values, NaN where there are not so many."""
    means = np.full(len(values), np.nan)
    means[count // 2 : len(values) - (count - 1) // 2] = np.convolve(values, np.ones(count) / count, "valid")
    return means


def draw_npt(deck: Curves) -> Figure:
    curves, (figure, (left, middle, right)) = deck["curves"], panels(3, width=3.5, height=3.3)
    for name, color in (("isotropic", MODEL), ("full", RED)):
        run = curves[name]
        time, volume = array(run["time_ps"]), array(run["volume_A3"]) / curves["num_atoms"]
        count = round(0.5 / (time[1] - time[0]))
        left.plot(time, volume, color=color, linewidth=0.6, alpha=0.3)
        left.plot(time, smooth(volume, count), color=color, linewidth=1.6, label=name)
        middle.plot(time, run["pressure_GPa"], color=color, linewidth=0.6, alpha=0.3)
        middle.plot(time, smooth(run["pressure_GPa"], count), color=color, linewidth=1.6)
        for edge in run["edges_A"]:
            right.plot(time, smooth(array(edge) / curves["copies"], count), color=color, linewidth=1.2)
            right.plot(0, edge[0] / curves["copies"], "o", color=TEACHER, markersize=3)
    left.set(xlabel="time (ps)", ylabel="volume (Å³/atom)")
    middle.set(xlabel="time (ps)", ylabel="pressure (GPa)")
    right.set(xlabel="time (ps)", ylabel="edges of the cubic cell (Å)")
    left.legend(frameon=False, loc="lower right", title="barostat, means over 0.5 ps")
    return figure


def draw_relax(deck: Curves) -> Figure:
    curves, (figure, (left, right)) = deck["curves"], panels(2)
    lowest = min(curves[name]["energy_eV"] for name in ("bfgs", "fire"))
    for name, label, color in (("bfgs", "BFGS", MODEL), ("fire", "FIRE", RED)):
        run = curves[name]
        above = 1e3 * (array(run["energy_above_last_eV"]) + run["energy_eV"] - lowest)
        shown = above > 0.01
        left.semilogy(array(run["steps"])[shown], above[shown], color=color, linewidth=1.2, label=label)
        right.semilogy(run["steps"], run["largest_force_eV/A"], color=color, linewidth=1.2, label=label)
    right.axhline(curves["fmax_eV/A"], color=TEACHER, linestyle="--", linewidth=0.9, label="fmax")
    left.set(xlabel="step", ylabel="energy above the lowest (meV)")
    right.set(xlabel="step", ylabel="largest force (eV/Å)")
    right.legend(frameon=False, loc="upper right")
    return figure


def draw_lammps(deck: Curves) -> Figure:
    curves, (figure, (left, right)) = deck["curves"], panels(2)
    time = 1e3 * array(curves["time_ps"])
    left.plot(time, 1e3 * array(curves["ase_change_eV"]), color=MUTED, linewidth=3.0, label="ASE")
    left.plot(time, 1e3 * array(curves["lammps_change_eV"]), color=MODEL, linewidth=1.0, label="LAMMPS")
    low, high = left.get_ylim()
    left.set(xlabel="time (fs)", ylabel="total energy change (meV)", ylim=(low, high + 0.15 * (high - low)))
    left.legend(frameon=False, loc="upper right", ncols=2)
    right.semilogy(time, curves["energy_difference_eV"], color=MODEL, linewidth=1.2, label="total energy (eV)")
    right.semilogy(time[1:], curves["positions_difference_A"][1:], color=RED, linewidth=1.2, label="positions (Å)")
    right.set(xlabel="time (fs)", ylabel="|LAMMPS − ASE|")
    right.legend(frameon=False, loc="lower right")
    return figure


def draw_ipi(deck: Curves) -> Figure:
    curves, (figure, (left, right)) = deck["curves"], panels(2)
    time = 1e3 * array(curves["time_ps"])
    left.plot(time, curves["kinetic_eV"], color=MODEL, linewidth=1.2, label=f"{curves['beads']} beads")
    left.axhline(
        curves["classical_kinetic_eV"], color=TEACHER, linestyle="--", linewidth=0.9, label="classical, 3/2 N kT"
    )
    left.set(xlabel="time (fs)", ylabel="kinetic energy (eV)", ylim=(0, None))
    left.legend(frameon=False, loc="lower right")
    right.plot(time, 1e3 * array(curves["conserved_change_eV"]), color=MODEL, linewidth=1.0)
    right.set(xlabel="time (fs)", ylabel="change of the conserved energy (meV)")
    return figure


STUDIES: dict[str, Callable[[Curves], Figure]] = {
    "equation_of_state": draw_equation_of_state, "elastic": draw_elastic, "phonons": draw_phonons, "neb": draw_neb,
    "radial": draw_radial,
}  # fmt: skip
DECKS: dict[str, Callable[[Curves], Figure]] = {
    "nve": draw_nve, "nvt": draw_nvt, "npt": draw_npt, "relax": draw_relax, "lammps": draw_lammps, "ipi": draw_ipi,
}  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """With a palette of 64 colors, which is a third of the size; aside, then renamed."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    aside = path.with_name(f".{path.name}.part")
    Image.open(image).convert("RGB").quantize(64).save(aside, format="png", optimize=True)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--properties", type=Path, default=BENCHMARKS / "results" / "properties.json")
    parser.add_argument("--decks", type=Path, default=BENCHMARKS / "results" / "decks.json")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "images")
    parser.add_argument("--only", nargs="+", choices=(*STUDIES, *DECKS), default=[*STUDIES, *DECKS])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name in STUDIES:
            figure = STUDIES[name](json.loads(args.properties.read_text("utf-8"))["studies"])
        else:
            figure = DECKS[name](json.loads(args.decks.read_text("utf-8"))["decks"][name])
        path = args.out / f"{name}.png"
        save(figure, path)
        print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
