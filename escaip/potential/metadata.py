"""What a potential was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PotentialMetadata:
    """What a potential was trained on; stored with it.

    Attributes:
        elements: atomic numbers it has seen; empty accepts every element (untrained models).
        level_of_theory: of the labels, in words.
        datasets: names of the training sets.
        provenance: anything else worth keeping: versions, seeds, command lines; plain JSON values.
    """

    elements: tuple[int, ...] = ()
    level_of_theory: str = "unknown"
    datasets: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**asdict(self), "elements": list(self.elements), "datasets": list(self.datasets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PotentialMetadata:
        """Inverse of :meth:`to_dict`."""
        return cls(
            elements=tuple(int(z) for z in values["elements"]),
            level_of_theory=str(values["level_of_theory"]),
            datasets=tuple(str(name) for name in values["datasets"]),
            provenance=dict(values["provenance"]),
        )
