"""Random draws, equal on every machine: each has a generator keyed by its purpose, so that none shifts another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """A NumPy generator seeded by the SHA-256 of the key's parts joined with "/"; equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw(rng: np.random.Generator, items: Iterable, count: int) -> list:
    """`count` distinct items in drawing order, uniformly without replacement; one bounded integer per item."""
    left = list(items)
    return [left.pop(int(rng.integers(len(left)))) for _ in range(count)]
