"""A command that is killed before a chosen change of the disk."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest


def is_killed_before_change(number: int, action: Callable[[], object]) -> bool:
    """Run a command that dies before its number-th change of the disk; return whether it came that far."""
    changes = count()

    def mortal(change: Callable[..., Any]) -> Callable[..., Any]:
        def change_or_die(*args: object, **options: object) -> object:
            if next(changes) == number:
                raise KeyboardInterrupt
            return change(*args, **options)

        return change_or_die

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "touch", "unlink", "write_bytes", "write_text"):
            patch.setattr(Path, name, mortal(getattr(Path, name)))
        try:
            action()
        except KeyboardInterrupt:
            return True
    return False
