"""What an adaptation leaves to be read, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptationRecord:
    """What one adaptation cost and how it went.

    steps: gradient steps; trained: number of weights that they changed; seconds: wall time, without encoding the
    support afterwards; losses: one per step; stop: why it ended early, "" if it did not.
    """

    steps: int = 0
    trained: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    stop: str = ""


class AdaptationError(RuntimeError):
    """An episode that cannot be adapted to: a loss that is not finite, an object that the support never shows."""
