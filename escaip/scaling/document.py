"""The report of a study: numbers, protocol and limits in one Markdown file, beside the sheet."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from escaip.scaling.files import write_whole
from escaip.scaling.laws import FitSettings
from escaip.scaling.records import Record, read_records
from escaip.scaling.report import markdown_table
from escaip.scaling.summary import StudyFit, fit_study

REPORT, SHEET = "report.md", "scaling"

_LIMITS = """## Limits

- The laws hold inside the ranges above. Outside nothing was measured: a law that fits says how steep the next factor of
  two is, not where it ends.
- They are of these data, this recipe and this length of training. Another schedule, mixture or level of theory has
  other exponents, and E is as much a property of the labels and of the validation set as of the models.
- Compute counts matrix and attention products of training (docs/scaling.md); time is another matter.
- Seeds change weights and order of the data. What another split would change is not in the intervals.
"""


def write_report(
    folder: str | os.PathLike[str], metric: str = "forces_mae", settings: FitSettings | None = None
) -> tuple[StudyFit, list[Path]]:
    """Fits a study and writes ``report.md``, ``scaling.png``, ``scaling.pdf`` and ``fit.json`` into its folder.

    Returns:
        the fits, and the files written.

    Raises:
        DataError: see :func:`escaip.scaling.fit_study`.
    """
    from escaip.scaling.sheet import draw_sheet

    place = Path(folder)
    study = fit_study(place, metric, settings)
    records = read_records(place)
    images = draw_sheet(study, records)
    content = {f"{SHEET}.{kind}": data for kind, data in images.items()}
    text = "\n\n".join([study.summary(), f"![sheet]({SHEET}.png)", protocol(place, records), _LIMITS])
    content[REPORT] = text.encode()
    for name, data in content.items():
        write_whole(place / name, data)
    return study, [place / name for name in content]


def protocol(folder: Path, records: Sequence[Record]) -> str:
    """What was run, from ``study.json`` and the records."""
    parts = ["## Protocol"]
    file = folder / "study.json"
    if file.is_file():
        import yaml

        plan: Any = json.loads(file.read_text(encoding="utf-8"))["study"]
        parts.append(f"```yaml\n{yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).strip()}\n```")
    rows = []
    for variant, size in dict.fromkeys((one.variant, one.size) for one in records):
        mine = [one for one in records if (one.variant, one.size) == (variant, size)]
        first = mine[0]
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({one.learning_rate for one in mine}))
        rows.append([
            variant, size, f"{first.parameters:,}", f"{first.parameters_total:,}", str(len(mine)),
            _span([one.structures for one in mine], "d"), _span([one.flops for one in mine], ".2g"), rates,
            f"{sum(one.seconds for one in mine) / 60:.0f}",
        ])  # fmt: skip
    header = ["variant", "size", "N", "with embeddings", "runs", "D", "C (FLOPs)", "learning rate", "minutes"]
    parts.append(markdown_table(header, rows))
    lost = [one.id for one in records if not one.losses]
    if lost:
        parts.append(f"Diverged, and in no fit: {', '.join(lost)}.")
    measured = [one.profiled for one in records if one.profiled is not None]
    if measured:
        parts.append(
            "C is by formula; a training step on two structures, run under PyTorch's counter, had "
            f"{_span(measured, '.5g')} times the formula's operations ({len(measured)} runs)."
        )
    commits = ", ".join(sorted({one.commit for one in records if one.commit}))
    parts.append(
        "N counts no embeddings. Losses are of the last validation, of averaged weights where the recipe has them. "
        f"{len(records)} runs, {sum(one.seconds for one in records) / 3600:.2f} hours in all; code: "
        f"{commits or 'unknown'}."
    )
    return "\n\n".join(parts)


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
