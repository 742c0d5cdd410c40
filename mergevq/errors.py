"""Every error that mergevq raises on purpose.

All of them are `MergeVQError`, and each is a builtin error too, so that `except ValueError` keeps working. The command
line prints them as one line. A message says what was expected, what came, and what to do about it.
"""


class MergeVQError(Exception):
    """Base of all errors raised on purpose by mergevq."""


class ShapeError(MergeVQError, ValueError):
    """A tensor has the wrong shape, range or type, or holds numbers that are not finite."""


class ConfigError(MergeVQError, ValueError):
    """A configuration, preset or option does not make sense."""


class CheckpointError(MergeVQError, ValueError):
    """A model file or a training state cannot be read, or does not fit the model."""


class TokenFileError(MergeVQError, ValueError):
    """A token file or a cache is damaged, of another version, or belongs to another tokenizer or teacher."""


class DataError(MergeVQError, ValueError):
    """Images are missing, unreadable or unsuitable."""


class WriteError(MergeVQError, OSError):
    """A file cannot be written: the disk is full, or the place forbids it. What was there before is untouched."""


class OutputExistsError(MergeVQError, FileExistsError):
    """Something is already where the result should go."""


class MissingDependencyError(MergeVQError, ImportError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


class NonFiniteLossError(MergeVQError, FloatingPointError):
    """A loss term became NaN or infinite; training stopped without changing the weights."""
