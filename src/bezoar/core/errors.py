"""The errors that bezoar raises on purpose.

BezoarError             caught by the command line: one line, exit code 2
├── ModelError          the model file or folder cannot be used
│   └── UnsafeError     opening it could run a stranger's code
├── DataError           the data cannot be used
├── MissingExtra        an optional library is missing or broken
├── UnsupportedModel    the model works, but not with this method
├── SettingError        a setting is out of range or unknown
├── ClusterError        the Ray cluster cannot be used, or lost a piece of work too often
└── BudgetSpent         the time is over
"""

from __future__ import annotations


class BezoarError(Exception):
    """Base of all errors that a user can act on.

    Args:
        message: What is wrong.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = message, hint
        super().__init__(f"{message}. {hint}" if hint else message)

    def __reduce__(self) -> tuple[type[BezoarError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # errors of other processes come back whole


class ModelError(BezoarError):
    """The model file or folder cannot be used."""


class UnsafeError(ModelError):
    """Opening the file could run code that came with it."""


class DataError(BezoarError):
    """The data cannot be used."""


class MissingExtra(BezoarError):
    """An optional library is missing or broken; the hint is the command that helps."""


class UnsupportedModel(BezoarError):
    """The model works, but not with this method."""


class SettingError(BezoarError):
    """A setting is out of range or unknown."""


class ClusterError(BezoarError):
    """The Ray cluster cannot be used, or lost a piece of work too often."""


class BudgetSpent(BezoarError):
    """The time given to a method is over."""
