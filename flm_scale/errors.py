"""What a user can cause. The command line prints one line, `flm: <message>`, and exits with 2; nothing else is printed.

A message says what is wrong, where, with which value, and the remedy.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can put right."""


class ConfigError(UserError):
    """A value in the Run that cannot work."""


class DataError(UserError):
    """Data on disk that is missing, damaged or of another kind than stated."""


class CheckpointError(UserError):
    """Weights on disk that are missing, damaged or of another model."""


class ToldElsewhereError(UserError):
    """Another process of this run has met it and says so, so the command line leaves this one out."""


class BadStepError(UserError):
    """Training met a step that it must not take, and did not."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
