"""What can end a run early."""

from __future__ import annotations


class SaveError(Exception):
    """Something of a run could not be written; every earlier checkpoint is as it was."""


class Interrupted(Exception):
    """A signal asked the run to stop; all processes raise it together."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal
