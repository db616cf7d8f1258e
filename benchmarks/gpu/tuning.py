"""Measures the tiles of the kernels; later parts of the suite use what it keeps."""

from __future__ import annotations
