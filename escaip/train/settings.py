"""Settings as plain containers, which a checkpoint can hold and be read without running code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from escaip.errors import ConfigError


def plain_values(value: Any) -> Any:
    """Returns dicts, lists, numbers, strings, booleans and None only; dataclasses become dicts.

    Raises:
        ConfigError: a value of any other type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"setting {value!r} of type {type(value).__name__} cannot be stored: use numbers, text and lists")
