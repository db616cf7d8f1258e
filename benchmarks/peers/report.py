"""Tables and relations of measured rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common import markdown_table
from peers.measure import Row
from peers.plan import REFERENCE, RELATIONS, Relation


def ratio(upper: Row, lower: Row) -> float | None:
    """Median over the turns of one over the other: what slows the machine down for a while slows both."""
    if upper.why or lower.why:
        return None
    return statistics.median(a / b for a, b in zip(upper.turns, lower.turns, strict=True))


def case_table(rows: Sequence[Row], reference: str = REFERENCE) -> str:
    """The rows of one case."""
    base = next((row for row in rows if row.variant == reference), None)
    header = ["who", "parameters", "ms", "min–max", "µs/atom", f"× {reference}", "MiB", "first call s", "why not"]
    lines = []
    for row in rows:
        parameters = "—" if row.parameters is None else f"{row.parameters:,}".replace(",", " ")
        if row.seconds is None:
            lines.append([row.variant, parameters, *["—"] * 6, (row.why or "").replace("|", "/")])
            continue
        times = None if base is None else ratio(row, base)
        lines.append([
            row.variant,
            parameters,
            digits(1e3 * row.seconds),
            f"{digits(1e3 * min(row.turns))}–{digits(1e3 * max(row.turns))}",
            digits(1e6 * row.seconds / row.atoms),
            "—" if times is None else digits(times),
            "—" if row.growth_MiB is None else f"{row.growth_MiB:.0f}",
            "—" if row.first is None else digits(row.first),
            "",
        ])  # fmt: skip
    return markdown_table(header, lines)


def summary_table(rows: Sequence[Row], suite: str) -> str:
    """µs per atom of every variant in every case of a suite, by the number of parameters."""
    chosen = [row for row in rows if row.suite == suite]
    cases = list(dict.fromkeys(row.case for row in chosen))
    cells: dict[tuple[str, str], Row] = {}
    for row in chosen:  # the reference is in every group: its first row stands for it
        cells.setdefault((row.variant, row.case), row)
    sizes = {row.variant: row.parameters or 0 for row in chosen}
    lines = []
    for name in sorted(sizes, key=lambda name: sizes[name]):
        found = [cells.get((name, case)) for case in cases]
        each = ["—" if row is None or row.seconds is None else digits(1e6 * row.seconds / row.atoms) for row in found]
        lines.append([name, f"{sizes[name] / 1e6:.2f} M" if sizes[name] else "—", *each])
    return markdown_table(["µs per atom", "parameters", *cases], lines)


def relate(rows: Sequence[Row], relation: Relation) -> dict[str, Any] | None:
    """How many times as fast; None where one of the two took no part in the case."""
    by = {row.variant: row for row in rows}
    ours, theirs = by.get(relation.ours), by.get(relation.theirs)
    if ours is None or theirs is None:
        return None
    found: dict[str, Any] = {"suite": ours.suite, "case": ours.case, "ours": relation.ours, "theirs": relation.theirs}
    times = ratio(theirs, ours)
    if times is None:
        missing = ours if ours.why else theirs
        return {**found, "why": f"{missing.variant}: {missing.why}"}
    found |= {"ours_ms": 1e3 * (ours.seconds or 0.0), "theirs_ms": 1e3 * (theirs.seconds or 0.0), "times": times}
    if relation.same_function and "energy" in ours.answer and "energy" in theirs.answer:
        size = max(abs(theirs.answer["energy"]), 1e-12)
        found["energies_differ_by"] = abs(ours.answer["energy"] - theirs.answer["energy"]) / size
    return found


def relations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every relation in every case."""
    cases = dict.fromkeys((row.group, row.suite, row.case) for row in rows)
    found = []
    for relation in RELATIONS:
        for case in cases:
            item = relate([row for row in rows if (row.group, row.suite, row.case) == case], relation)
            if item is not None:
                found.append(item)
    return found


def relation_line(item: dict[str, Any]) -> str:
    """One relation in one case."""
    where = f"{item['suite']}, {item['case']}: "
    if "why" in item:
        return f"{where}no ratio of {item['theirs']} to {item['ours']}: {item['why']}"
    line = (
        f"{where}{item['theirs']} {digits(item['theirs_ms'])} ms, {item['ours']} {digits(item['ours_ms'])} ms: "
        f"{digits(item['times'])}×"
    )
    if "energies_differ_by" in item:
        line += f" (energies differ by {item['energies_differ_by']:.0e})"
    return line


def slopes(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Exponent of the cost with the number of atoms, for each variant: of all sizes, and of the larger half."""
    found = {}
    for name in dict.fromkeys(row.variant for row in rows if row.suite == "cost"):
        points = sorted((row.atoms, row.seconds) for row in rows if row.variant == name and row.suite == "cost"
                        and row.seconds is not None)  # fmt: skip
        if len(points) > 1:
            upper = points[len(points) // 2 :] if len(points) > 3 else points
            found[name] = {"slope": _slope(points), "slope_upper_half": _slope(upper), "largest": points[-1][0]}
    return found


def slope_table(found: dict[str, dict[str, Any]]) -> str:
    header = ["who", "exponent", "of the larger half", "largest that ran"]
    return markdown_table(header, [
        [name, f"{item['slope']:.2f}", f"{item['slope_upper_half']:.2f}", str(item["largest"])]
        for name, item in found.items()
    ])  # fmt: skip


def to_json(row: Row) -> dict[str, Any]:
    """With the median in ms."""
    seconds = row.seconds
    return {**asdict(row), "ms": None if seconds is None else 1e3 * seconds}


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0.0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _slope(points: Sequence[tuple[int, float | None]]) -> float:
    x = [math.log(atoms) for atoms, _ in points]
    y = [math.log(seconds or math.nan) for _, seconds in points]
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
