"""What settings of a graph may be, and how far they look."""

from __future__ import annotations

import math

from escaip.errors import ConfigError, UsageError
from escaip.graph.step import step_support
from escaip.types import GraphSettings


def search_cutoff(settings: GraphSettings) -> float:
    """Returns the radius in Å within which an atom can influence a token: ``r_c``, plus the step's support.

    Raises:
        ConfigError: a setting is out of range.
    """
    check_settings(settings)
    return settings.cutoff + support_of(settings)


def check_slack(slack: float, settings: GraphSettings) -> float:
    """Returns the slack.

    Raises:
        UsageError: it is negative, or positive for ranks that may change with any distance.
    """
    if not (slack >= 0.0 and math.isfinite(slack)):
        raise UsageError(f"slack is {slack}: it must be 0 or more Å")
    if slack > 0.0 and settings.num_neighbors is not None:
        if not settings.soft:
            raise UsageError(f"slack is {slack:g} Å, but hard ranks change with any distance: build without slack")
        if settings.rank_truncation is not None:
            raise UsageError(f"slack is {slack:g} Å, but truncated ranks change with any distance: build without slack")
    return slack


def support_of(settings: GraphSettings) -> float:
    """Å beyond which two distances no longer exchange rank."""
    if settings.num_neighbors is None or not settings.soft:
        return 0.0
    return step_support(settings.rank_step) * settings.rank_scale


def check_settings(settings: GraphSettings) -> None:
    """Raises ConfigError for a setting that is out of range."""
    for name in ("cutoff", "rank_scale", "envelope_scale"):
        value = getattr(settings, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"graph setting {name} is {value}: it must be a positive number")
    if settings.num_neighbors is not None and settings.num_neighbors < 1:
        raise ConfigError(
            f"graph setting num_neighbors is {settings.num_neighbors}: it must be at least 1, or None for a plain "
            "radius graph"
        )
    if settings.rank_truncation is not None and settings.rank_truncation < 0:
        raise ConfigError(f"graph setting rank_truncation is {settings.rank_truncation}: it must be None or at least 0")
    step_support(settings.rank_step)
