"""Errors a user can cause, each with one line that names the thing and the remedy.

The command line prints the message of an ``EscaipError`` alone and ends with
status 1 (2 for a ``UsageError``); ``--debug`` shows the traceback.
"""


class EscaipError(Exception):
    """Base of every error that bad input, and not a bug, can cause."""


class UsageError(EscaipError):
    """A command or a setting cannot be used as given (exit status 2)."""


class ConfigError(UsageError):
    """A model, data or training setting is invalid; the message names it."""


class DataError(EscaipError):
    """A structure, label or data file cannot be used; the message names file, key and index."""


class CheckpointError(EscaipError):
    """A model file is damaged, unsafe, or of a schema this version cannot read."""


class UnsupportedElementError(EscaipError):
    """A structure holds elements that the potential was not trained on."""


class SimulationError(EscaipError):
    """A simulation stopped because it left the region where it means anything."""


class TrainingError(EscaipError):
    """Training stopped; the message names the batch and the last good checkpoint."""
