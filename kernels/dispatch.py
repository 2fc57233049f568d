"""Which implementation of the operators runs; written into the header of every run."""

from __future__ import annotations


def backend_in_use() -> str:
    """Name of the operators' implementation: "pytorch", built from PyTorch's own operators on every device."""
    return "pytorch"
