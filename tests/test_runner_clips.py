"""Runs whose method answers several sentences of a clip at once: stored as if they were asked one by one."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noisy_runs import QUERIES, Noisy, content, copy_cut, start

from fewref.benchmark import runner
from fewref.benchmark.judge import judge
from fewref.benchmark.store import read_predictions, read_rows
from fewref.benchmark.units import tasks_of, units_of
from fewref.episodes import readers
from fewref.episodes.readers import read_index
from fewref.episodes.types import Prediction
from fewref.methods.base import UNTRAINED, Method, MethodInfo
from fewref.methods.controls import Oracle
from fewref.methods.registry import load_method

CLIPS = QUERIES // 2


@pytest.fixture
def short(small):
    """Two episodes, so eight queries about four clips."""
    manifest = dataclasses.replace(small.manifest, episodes=small.manifest.episodes[1:3])
    return SimpleNamespace(index=small.index, manifest=manifest)


def built(name: str, alone: bool = False) -> Method:
    """An untrained network; alone: with its sentences asked one by one."""
    cls = load_method(name)
    if alone:
        cls = type(cls.__name__, (cls,), {"shares_clips": False, "__module__": cls.__module__})
    method = cls(weights=UNTRAINED, window=2)
    method.tokenizer = spell
    return method


def spell(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that tell the sentences of the small data apart, which are no words of the tiny vocabulary."""
    ids = torch.tensor([[5 + ord(letter) % 50 for letter in sentence] for sentence in sentences])
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("name", ["cma", "referformer"])
def test_together_or_one_by_one_the_files_are_equal(short, tmp_path, name):
    start(short, tmp_path / "alone", built(name, alone=True), method_name=name)
    start(short, tmp_path / "together", built(name), method_name=name)
    rows = (tmp_path / "together/rows.jsonl").read_bytes().splitlines(keepends=True)
    predictions = (tmp_path / "together/predictions.jsonl").read_bytes().splitlines(keepends=True)
    copy_cut(tmp_path / "together", tmp_path / "cut", b"".join(rows[:3]), b"".join(predictions[:4])[:-9])
    start(short, tmp_path / "cut", built(name), method_name=name)
    assert len({row.confidence for row in read_rows(tmp_path / "alone")}) == 8
    for other in ("together", "cut"):
        assert content(tmp_path / other) == content(tmp_path / "alone")
        assert (tmp_path / other / "predictions.jsonl").read_bytes() == (
            tmp_path / "alone/predictions.jsonl"
        ).read_bytes()
    for number in range(2):
        start(short, tmp_path / "shards", built(name), method_name=name, shard=(number, 2))
    assert list(read_predictions(tmp_path / "shards")) == list(read_predictions(tmp_path / "alone"))


def test_frames_and_masks_are_decoded_once_per_clip(short, small, tmp_path, monkeypatch):
    decoded: list[str] = []
    for name in ("decode_frame", "decode_labels"):
        real = getattr(readers, name)
        monkeypatch.setattr(readers, name, lambda path, real=real: decoded.append(str(path)) or real(path))
    index = read_index(small.index.dataset, small.root)
    one = dataclasses.replace(short.manifest, episodes=short.manifest.episodes[:1])
    start(SimpleNamespace(index=index, manifest=one), tmp_path / "run", built("referformer"), method_name="referformer")
    assert len(decoded) == len(set(decoded)) > 0
    asked = {query.clip.video for query in one.episodes[0].queries}
    assert {video for video in asked if any(video in path for path in decoded)} == asked


class Together(Noisy):
    """Answers depend on the query alone; notes how it was asked."""

    broken: tuple[str, ...] = ()

    def predict(self, query):
        self.calls.append(query.id)
        if query.id in self.broken:
            raise ValueError("cannot answer this")
        rng = np.random.default_rng(list(query.id.encode()))
        return Prediction(query.id, rng.random((len(query.frames), *query.frames.shape[2:])) > 0.5)

    def predict_clip(self, queries):
        assert len({id(query.frames) for query in queries}) == 1
        self.calls.append(len(queries))
        return [self.predict(query) for query in queries]


class Alone(Together):
    shares_clips = False


Together.__qualname__ = Alone.__qualname__ = "Together"


@pytest.fixture
def straight(small, tmp_path):
    start(small, tmp_path / "straight", Alone())
    return tmp_path / "straight"


def equal(folder, other) -> bool:
    return all(content(folder, kind) == content(other, kind) for kind in ("rows", "predictions"))


def test_one_call_per_clip_and_its_seconds_shared(small, straight, tmp_path):
    method = Together()
    rows = start(small, tmp_path / "run", method).rows
    assert method.calls.count(2) == CLIPS
    assert method.calls.count("adapt") == len(small.manifest.episodes)
    assert equal(tmp_path / "run", straight)
    pairs = [(rows[place], rows[place + 1]) for place in range(0, QUERIES, 2)]
    assert all(one.video == other.video and one.seconds_predict == other.seconds_predict for one, other in pairs)


def test_the_next_clip_is_asked_about_before_the_scores_of_the_last_are_waited_for(
    small, straight, tmp_path, monkeypatch
):
    class Later(Future):
        """Is done when somebody waits for it."""

        def result(self, timeout=None):
            method.calls.append("waited")
            return judge(*self.given)

    class Pool(Executor):
        def submit(self, function, *given):
            job = Later()
            job.given = given
            return job

    monkeypatch.setattr(runner, "open_pool", lambda workers: nullcontext(Pool()))
    method = Together()
    start(small, tmp_path / "run", method, workers=1)
    assert method.calls[: method.calls.index("waited")].count(2) > 1
    assert method.calls.count("waited") == QUERIES
    assert equal(tmp_path / "run", straight)


def test_taken_up_in_the_middle_of_a_clip(small, straight, tmp_path):
    lines = {kind: (straight / f"{kind}.jsonl").read_bytes().splitlines(True) for kind in ("rows", "predictions")}
    for done in (1, 2, 3):
        copy_cut(straight, tmp_path / str(done), *(b"".join(lines[kind][:done]) for kind in ("rows", "predictions")))
        method = Together()
        start(small, tmp_path / str(done), method)
        assert equal(tmp_path / str(done), straight)
        asked = [call for call in method.calls if isinstance(call, str) and call != "adapt"]
        assert asked == [json.loads(line)["query"] for line in lines["rows"][done:]]


def test_only_the_guilty_query_fails(small, straight, tmp_path, capsys):
    bad = small.manifest.episodes[0].queries[1].id
    method = Together()
    method.broken = (bad,)
    rows = start(small, tmp_path / "run", method).rows
    assert {row.query for row in rows if row.status == "failed"} == {bad}
    assert "ValueError: cannot answer this" in next(row.error for row in rows if row.error)
    assert "asked one by one, since together: ValueError: cannot answer this" in capsys.readouterr().err
    assert start(small, tmp_path / "run", Together()).failed == 0
    assert equal(tmp_path / "run", straight)


def test_a_wrong_number_of_answers_is_noticed(small, straight, tmp_path, capsys):
    class Forgetful(Together):
        def predict_clip(self, queries):
            return super().predict_clip(queries)[1:]

    Forgetful.__qualname__ = "Together"
    start(small, tmp_path / "run", Forgetful())
    assert "predict_clip gives 1 answers to 2 queries" in capsys.readouterr().err
    assert equal(tmp_path / "run", straight)


def test_out_of_memory_halves_the_window_of_the_clip(small, straight, tmp_path):
    class Hungry(Together):
        def predict_clip(self, queries):
            if self.window > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().predict_clip(queries)

    result = start(small, tmp_path / "run", Hungry(window=10))
    assert {row.window for row in result.rows} == {2}
    assert content(tmp_path / "run", "predictions") == content(straight, "predictions")


def test_a_clip_asked_about_twice_with_another_between(small, tmp_path):
    """Rows come in the order of the manifest even so."""
    episode = small.manifest.episodes[0]
    places = (0, 2, 1, 3)
    shuffled = dataclasses.replace(
        episode,
        queries=tuple(episode.queries[place] for place in places),
        targets=tuple(episode.targets[place] for place in places),
    )
    manifest = dataclasses.replace(small.manifest, episodes=(shuffled,))
    units = units_of(tasks_of(manifest))
    assert [len(unit.tasks) for unit in units] == [2, 2]
    assert [(unit.begins, unit.ends) for unit in units] == [(True, False), (False, True)]
    rows = start(SimpleNamespace(index=small.index, manifest=manifest), tmp_path / "run", Together()).rows
    assert [row.query for row in rows] == [query.id for query in shuffled.queries]
    assert read_rows(tmp_path / "run") == rows
    assert [key[1] for key, _ in read_predictions(tmp_path / "run")] == [row.query for row in rows]


def test_who_sees_the_truth_is_asked_alone(small, tmp_path):
    class Seer(Oracle):
        def predict_clip(self, queries):
            raise AssertionError

        predict = Oracle.predict

    rows = start(small, tmp_path / "run", Seer()).rows
    assert {row.means("davis") for row in rows} == {(1.0, 1.0)}


def test_pixels_that_a_method_changes_are_its_own(small, tmp_path):
    class Scribbler(Noisy):
        info = MethodInfo("scribbler", "blackens what it saw")

        def predict(self, query):
            assert query.frames.any()
            query.frames[...] = 0
            return super().predict(query)

    assert start(small, tmp_path / "run", Scribbler()).failed == 0
