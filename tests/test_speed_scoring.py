"""The speed table of the scorer, on so few frames that only its making is tested."""

from __future__ import annotations

import numpy as np
import pytest

from fewref.benchmark import speed_scoring
from fewref.benchmark.metrics import frame_scores
from fewref.benchmark.speed import main
from fewref.benchmark.speed_scoring import definition_scores, fast_scores, imperfect, moving_masks, scoring_table
from fewref.benchmark.speed_scoring import two_processes as in_two

pytest.importorskip("cv2", reason="the definition dilates with OpenCV")


def small_video(frames: int = 5) -> tuple[np.ndarray, np.ndarray]:
    truth = moving_masks(frames, 60, 80, seed=3)
    return imperfect(truth, seed=4), truth


def rows_of(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:3] in ("| 4", "| 3")
    ]


def test_table_has_a_line_per_size_tolerance_and_way() -> None:
    rows = rows_of(scoring_table(frames=2, rounds=1, device="cpu"))
    ways = ["one process", "two processes", "cpu"]
    sizes = [("480x854", "0.008", "8"), ("480x854", "0.01", "10"), ("360x640", "0.008", "6"), ("360x640", "0.01", "8")]
    assert [tuple(row[:4]) for row in rows] == [(*size, way) for size in sizes for way in ways]
    for row in rows:
        assert len(row) == len(speed_scoring.COLUMNS)
        assert all(float(cell) >= 0 for cell in row[4:])


def test_two_processes_score_what_one_does() -> None:
    pred, truth = small_video()
    with in_two(pred, truth) as both:
        for scorer in (definition_scores, fast_scores):
            timed = both(scorer, 0.1)
            assert [len(j) for j, _ in timed.scores] == [2, 3]
            assert np.array_equal(np.concatenate(timed.scores, axis=1), frame_scores(pred, truth, 0.1)[:2])
            assert min(timed.wall, timed.cpu) > 0


def test_wrong_scores_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = lambda *masks: tuple(scores * 0.99 for scores in fast_scores(*masks))  # noqa: E731
    monkeypatch.setattr(speed_scoring, "fast_scores", worse)
    with pytest.raises(RuntimeError, match="differs from the definition"):
        scoring_table(frames=2, rounds=1)


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scoring", "--frames", "2"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 8
