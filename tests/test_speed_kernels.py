"""The table of kernel speeds at tiny sizes: which rows and columns there are, and that wrong numbers stop it."""

from __future__ import annotations

import re

import pytest
import torch

from fewref.benchmark import speed_kernels
from fewref.benchmark.speed_kernels import BOTH, FORWARD, PAPER_MAPS, kernels_table, masks, sampling
from fewref.kernels.dispatch import ENVIRONMENT, import_problem


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_operator_is_timed_on_every_backend_of_a_cpu() -> None:
    text = kernels_table(repeats=1, quick=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][3:6] == ["reference", "pytorch", "numba"]
    rows = lines[2:]
    assert [tuple(row[:3]) for row in rows] == [
        (op, size, what)
        for op, size in (
            ("deformable attention", "encoder"),
            ("deformable attention", "decoder"),
            ("affinity", "tiny"),
            ("dynamic mask", "tiny"),
            ("linear", "tiny"),
        )
        for what in (FORWARD, BOTH)
        if (op, what) != ("linear", BOTH)
    ]
    for row in rows:
        assert re.fullmatch(r"[\d.e+]+ ms", row[3])
        assert re.fullmatch(r"[\d.e+]+ ms \([\d.]+x\)", row[4])
        compiled = row[0] == "deformable attention" and not import_problem("numba")
        assert bool(re.fullmatch(r"[\d.e+]+ ms \([\d.]+x\)", row[5])) == compiled
        assert float(row[6]) > 0


def test_a_backend_with_other_numbers_stops_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed_kernels.affinity
    wrong = lambda *given, backend: real(*given, backend=backend) * (1 + (backend == "pytorch"))  # noqa: E731
    monkeypatch.setattr(speed_kernels, "affinity", wrong)
    with pytest.raises(RuntimeError, match="affinity: pytorch differs from reference"):
        kernels_table(repeats=1, quick=True)


def test_floors_are_those_of_the_specification() -> None:
    """Its section 5: 20 and 20 + 40 ms for the encoder, 32 ms for the mask head of one layer."""
    generator = torch.Generator()
    encoder = sampling("encoder", PAPER_MAPS, 10, None, generator, "meta")
    assert 1e3 * encoder.floor(FORWARD) == pytest.approx(20, abs=0.5)
    assert 1e3 * encoder.floor(BOTH) == pytest.approx(60, abs=1)
    assert encoder.flop[FORWARD] == pytest.approx(1.7e9, rel=0.1)
    head = masks("paper", 10, 5, 256, 90, 160, generator, "meta")
    assert 1e3 * head.floor(FORWARD) == pytest.approx(32, abs=1)
    assert head.flop[FORWARD] == pytest.approx(3.1e9, rel=0.05)
