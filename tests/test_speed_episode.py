"""The race of one episode: both ways agree, and a difference is not hidden."""

from __future__ import annotations

import pytest

from fewref.benchmark import speed_episode
from fewref.benchmark.speed_episode import QUICK, episode_table, write_episode

pytest.importorskip("cv2")


def test_the_table_compares_both_ways() -> None:
    plain, fast, half = (line.split("|") for line in episode_table(quick=True, half=True).splitlines()[2:5])
    assert [row[1].strip() for row in (plain, fast, half)] == ["plain", "FewRef", "FewRef, bf16"]
    assert plain[3].strip() == "1.0"
    assert plain[6:8] == fast[6:8]


def test_ways_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = speed_episode.plain_way

    def other(*given: object) -> speed_episode.Scores:
        return {query: (j + 1e-4, f) for query, (j, f) in scores(*given).items()}

    monkeypatch.setattr(speed_episode, "plain_way", other)
    with pytest.raises(RuntimeError, match="differ by 0.0001"):
        episode_table(quick=True)


def test_the_episode_asks_three_sentences_about_one_video(tmp_path) -> None:
    index, manifest = write_episode(tmp_path, QUICK)
    (episode,) = manifest.episodes
    assert {query.clip.video for query in episode.queries} == {"query"}
    assert len({query.text for query in episode.queries}) == 3
    assert [shot.clip.video for shot in episode.support.shots] == ["support"]
    assert len(episode.support.shots[0].clip.frames) == QUICK.support
    assert {len(query.clip.frames) for query in episode.queries} == {QUICK.frames}
