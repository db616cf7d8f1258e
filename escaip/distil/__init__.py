"""Turns a slow calculator into a fast potential: structures, labels, trainings, active rounds (`escaip distil`)."""

from escaip.lazy import lazy_names

_NAMES = {"plan": ("DistilPlan",), "run": ("distil",)}
__all__ = ["DistilPlan", "distil"]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
