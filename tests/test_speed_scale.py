"""The tables of growth: that they hold what was measured, and that what they measure with measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewref.benchmark import speed_scale
from fewref.benchmark.speed_scale import QUICK, Growth, Sizes, growth_tables, metadata_table, scale_table
from fewref.episodes.readers import read_index


def cells(table: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {len(lines[0])}
    return lines[2:]


def test_the_whole_table() -> None:
    processes, clips, shots, _, metadata, machine = scale_table(quick=True).split("\n\n")
    one, two = cells(processes)
    assert (one[0], two[0]) == ("1", "2")
    assert one[2] == two[2] == "12"  # queries: one for each of the twelve categories of a group
    assert float(one[5]) == pytest.approx(float(two[5]), abs=0.05)
    assert float(one[5]) > 20  # the shipped weights answer
    assert float(two[4]) == pytest.approx(float(two[3]) / float(one[3]), rel=0.3)  # of rounded, perhaps low rates
    assert [row[0] for row in cells(clips)] == list(map(str, QUICK.lengths))
    assert [row[0] for row in cells(shots)] == list(map(str, QUICK.shots))
    assert [row[1] for row in cells(metadata)[1:]] == list(map(str, QUICK.episodes))
    assert "torch" in machine


def test_growth_is_told_against_the_first() -> None:
    sizes = Sizes(1, 1, (10, 40), (1, 4), 1, (1,), 1)
    told = {
        (10, 1): Growth(adapt=0.01, predict=0.1, peak=100_000_000),
        (40, 1): Growth(adapt=0.01, predict=0.5, peak=110_000_000),
        (10, 4): Growth(adapt=0.03, predict=0.2, peak=150_000_000),
    }
    asked = []

    def call(function: object, length: int, shots: int, rounds: int) -> Growth:
        asked.append((length, shots))
        assert function is speed_scale.measure_growth
        return told[length, shots]

    clips, shots = growth_tables(sizes, call)
    assert asked == list(told)
    assert cells(clips) == [["10", "100", "10.0", "1.00", "100", "1.00"], ["40", "500", "12.5", "1.25", "110", "1.10"]]
    assert cells(shots) == [
        ["1", "10", "1.00", "100", "1.00", "100", "1.00"],
        ["4", "30", "3.00", "200", "2.00", "150", "1.50"],
    ]


def test_one_clip_is_measured() -> None:
    """What is reported is what came on top of a method that has been used."""
    measured = speed_scale.measure_growth(30, 1, 1)
    assert min(measured.adapt, measured.predict) > 0
    assert 0 < measured.peak < 500e6


def test_metadata_are_those_of_the_layout(tmp_path: Path) -> None:
    speed_scale.write_metadata(tmp_path, 60)
    index = read_index("mini-ref-youtube-vos", tmp_path)
    assert not index.warnings
    assert len(index.videos) == 60
    assert {len(video.expressions) for video in index.videos.values()} == {4}
    sizes = Sizes(1, 1, (), (), 96, (5, 30), 1)
    said, table = metadata_table(sizes).split("\n\n")
    assert said.startswith("96 videos, 384 sentences: index read in ")
    assert [(row[0], row[1]) for row in cells(table)] == [("group", "60"), ("random", "5"), ("random", "30")]
