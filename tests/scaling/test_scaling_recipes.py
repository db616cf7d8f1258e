"""The studies of configs/scaling: that they build, and what their headers and documentation say of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from escaip import EScAIP
from escaip.files import config_path, list_configs
from escaip.models import EScAIPConfig
from escaip.scaling.flops import GraphShape, count_flops, parameter_count
from escaip.scaling.study import StudyPlan

NAMES = list_configs("scaling")
# Mean structures that the headers count with; of the molecules of SPICE as they were measured.
SHAPES = {
    "h200": GraphShape(19.33, 272.1, 4077.0),
    "omol25": GraphShape(50, 50 * 31, 50 * 31**2),
    "oc20": GraphShape(73, 73 * 31, 73 * 31**2),
    "ablations": GraphShape(19.33, 191.5, 1973.0),
}
MOLECULES = 4833  # of 5370, nine tenths


def header(name: str) -> str:
    """Comment lines before the first entry, as one."""
    lines = config_path(name, "scaling").read_text("utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", text)]


def cost(name: str, variant: str, size: str) -> float:
    """FLOPs of a mean structure in training; tables of distances are spread over a run."""
    return count_flops(StudyPlan.read(name).architecture(variant, size), SHAPES[name].times(1e5)) / 1e5


@pytest.mark.parametrize("name", NAMES)
def test_every_job_builds(name: str) -> None:
    plan = StudyPlan.read(name)
    rates = {(variant, size): 1e-3 for variant in plan.variants for size in plan.sizes}
    jobs = [*plan.sweep_jobs(), *plan.jobs(rates if plan.learning_rate.sweep else None)]
    assert len({job.id for job in jobs}) == len(jobs)
    for architecture in {str(one): one for one in (job.config["model"]["architecture"] for job in jobs)}.values():
        with torch.device("meta"):
            EScAIP(EScAIPConfig.from_dict(architecture))


@pytest.mark.parametrize("name", NAMES)
def test_the_header_names_its_own_command(name: str) -> None:
    assert f"escaip scaling run {name} " in header(name)
    assert re.search(r"hour|minute|never run", header(name))


@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [
        ("h200", "0.38, 1.31, 4.8 and 18.6 M parameters", "0.41, 1.55, 6.0 and 23.6 GFLOP"),
        ("omol25", "0.90, 2.9, 10.5 and 40 M parameters", "6.0, 23, 88 and 349 GFLOP"),
        ("oc20", "4.0, 8.2, 14.1, 30.6 and 53.3 M parameters", "27, 59, 104, 234 and 414 GFLOP"),
    ],
)
def test_sizes_and_costs_of_the_headers(name: str, parameters: str, flops: str) -> None:
    plan = StudyPlan.read(name)
    (variant,) = plan.variants
    assert parameters in header(name)
    assert flops in header(name)
    count = [parameter_count(plan.architecture(variant, size)).non_embedding for size in plan.sizes]
    assert count == pytest.approx([1e6 * x for x in numbers(parameters)], rel=0.02)
    costs = [cost(name, variant, size) for size in plan.sizes]
    assert costs == pytest.approx([1e9 * x for x in numbers(flops)], rel=0.03)


def totals(name: str) -> tuple[float, float]:
    """FLOPs of the grid, and of the sweep."""
    plan = StudyPlan.read(name)
    rate, grid, sweep = plan.learning_rate, 0.0, 0.0
    for variant in plan.variants:
        for size in plan.sizes:
            one = cost(name, variant, size)
            seen = sum(d if d > 1 else d * MOLECULES for d in plan.data_sizes)
            grid += len(plan.seeds) * (sum(plan.budgets) or one * seen * (plan.epochs or 0))
            if size in plan.swept_sizes(variant):
                swept = rate.data_size or 0.0
                swept *= 1 if swept > 1 else MOLECULES
                sweep += len(rate.sweep) * one * swept * (rate.epochs or plan.epochs or 0)
    return grid, sweep


def test_budgets_of_the_headers() -> None:
    assert totals("h200") == pytest.approx((4.3e15, 9.0e13), rel=0.03)
    assert totals("omol25") == pytest.approx((1.3e19, 2.7e16), rel=0.04)
    assert totals("oc20") == pytest.approx((7.8e18, 5.3e16), rel=0.03)
    assert sum(totals("ablations")) == pytest.approx(5.0e14, rel=0.03)
    for name, text in (("h200", "4.3e15"), ("omol25", "1.3e19"), ("oc20", "7.8e18"), ("ablations", "5.0e14")):
        assert f"{text} FLOPs" in header(name) or f"together {text}" in header(name)


def test_no_frame_of_oc20_is_seen_twice() -> None:
    plan = StudyPlan.read("oc20")
    seen = max(plan.budgets) / min(cost("oc20", "default", size) for size in plan.sizes)
    assert 18e6 < seen < 20e6 - 20_000
    assert min(plan.budgets) / max(cost("oc20", "default", size) for size in plan.sizes) > 40_000


@pytest.mark.parametrize("width", [64, 96, 128])
def test_ablations_have_equal_parameters(width: int) -> None:
    plan = StudyPlan.read("ablations")
    count = {v: parameter_count(plan.architecture(v, f"w{width}")).non_embedding for v in plan.variants}
    equal = ("baseline", "no_angles", "no_order", "hard_neighbors", "attention", "feed_forward")
    chosen = [count[name] for name in equal]
    assert max(chosen) / min(chosen) < 1.05
    assert 1.3 < count["direct"] / count["baseline"] < 1.5  # as the header says
    deep, flat = (plan.architecture(name, f"w{width}") for name in ("attention", "feed_forward"))
    assert deep.num_layers == 2 * flat.num_layers
    assert count_flops(deep, SHAPES["ablations"]) > 1.2 * count_flops(flat, SHAPES["ablations"])


def test_the_documentation_lists_every_recipe() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "scaling.md").read_text("utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []
