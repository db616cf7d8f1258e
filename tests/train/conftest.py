"""Warnings of Lightning about itself are not errors here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # coordinates.py

LIGHTNING = (
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The number of training batches",
    "ignore:.*treespec",
    "ignore:The .* does not have many workers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/train" in str(item.path):
            for text in LIGHTNING:
                item.add_marker(pytest.mark.filterwarnings(text))
