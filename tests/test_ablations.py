"""Wrong sentences and supports are wrong, and the same ones every time."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from fewref.benchmark.ablations import ask_with, blank, support_from
from fewref.benchmark.runner import run
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_support
from fewref.episodes.types import Prediction
from fewref.methods.base import Method, MethodInfo


def questions(manifest):
    for episode in manifest.episodes:
        for query, target in zip(episode.queries, episode.targets, strict=True):
            yield episode, query, target


def without_expressions(index, kept=lambda expression: False):
    """The index with only those expressions that `kept` accepts."""
    videos = {
        name: dataclasses.replace(video, expressions=tuple(filter(kept, video.expressions)))
        for name, video in index.videos.items()
    }
    return dataclasses.replace(index, videos=videos)


def test_right_and_empty(small):
    for item in questions(small.manifest):
        assert ask_with("right", *item, small.manifest, small.index) is item[1]
        assert ask_with("empty", *item, small.manifest, small.index) == dataclasses.replace(item[1], text="")


def test_other_sentence_is_of_another_object_of_the_video(small):
    for item in questions(small.manifest):
        _, query, target = item
        asked = ask_with("other", *item, small.manifest, small.index)
        (speaker,) = [e for e in small.index.videos[query.clip.video].expressions if e.text == asked.text]
        assert set(speaker.objects).isdisjoint(target.expression.objects)
        assert asked == dataclasses.replace(query, text=asked.text)
        assert ask_with("other", *item, small.manifest, small.index) == asked


def test_other_sentence_falls_back_to_the_episode_then_the_manifest(small):
    mute = without_expressions(small.index)
    for episode, query, target in questions(small.manifest):
        asked = ask_with("other", episode, query, target, small.manifest, mute)
        assert asked.text in {q.text for q in episode.queries if q.clip.video != query.clip.video}
    alone = tuple(dataclasses.replace(e, queries=e.queries[:1], targets=e.targets[:1]) for e in small.manifest.episodes)
    manifest = dataclasses.replace(small.manifest, episodes=alone)
    texts = {episode.queries[0].text for episode in alone}
    for episode, query, target in questions(manifest):
        assert ask_with("other", episode, query, target, manifest, mute).text in texts - {query.text}
    single = dataclasses.replace(manifest, episodes=alone[:1])
    with pytest.raises(InputError, match="has no sentence but"):
        ask_with("other", *next(questions(single)), single, mute)


def test_support_of_the_next_category_and_the_same_draw(small):
    following = {"crocodile": "hat", "hat": "raccoon", "raccoon": "crocodile"}
    supports = {(e.category, e.seed): e.support for e in small.manifest.episodes}
    assert len(supports) == 6
    for episode in small.manifest.episodes:
        expected = supports[following[episode.category], episode.seed]
        assert support_from("other-category", episode, small.manifest) == expected
        assert support_from("right", episode, small.manifest) is episode.support
        assert support_from("none", episode, small.manifest) is episode.support


def test_support_videos_that_are_asked_about_come_last(small):
    own, *others = small.manifest.episodes
    asked = own.queries[0].clip
    nearest = support_from("other-category", own, small.manifest)
    changed = []
    for episode in others:
        if episode.support == nearest:
            shots = tuple(dataclasses.replace(shot, clip=asked) for shot in nearest.shots)
            episode = dataclasses.replace(episode, support=dataclasses.replace(nearest, shots=shots))
        changed.append(episode)
    manifest = dataclasses.replace(small.manifest, episodes=(own, *changed))
    chosen = support_from("other-category", own, manifest)
    assert chosen.shots[0].clip.video != asked.video
    assert chosen.category == nearest.category


def test_one_category_has_no_other(small):
    own = small.manifest.episodes[0]
    manifest = dataclasses.replace(small.manifest, episodes=(own,))
    with pytest.raises(InputError, match=f"--support other-category: .* is all {own.category}"):
        support_from("other-category", own, manifest)


def test_blank_has_sizes_and_nothing_else(small):
    support = load_support(small.index, small.manifest.episodes[0].support)
    bare = blank(support)
    assert bare.category == ""
    for shot, before in zip(bare.shots, support.shots, strict=True):
        assert shot.frames.shape == before.frames.shape
        assert shot.frames.dtype == np.uint8
        assert shot.masks.shape == before.masks.shape
        assert before.masks.any()
        assert not shot.frames.any()
        assert not shot.masks.any()
        assert (shot.expression.text, shot.expression.category) == ("", "")


class Listener(Method):
    """Notes what it is given."""

    info = MethodInfo("listener", "notes what it is given")

    def adapt(self, support):
        self.heard = [*getattr(self, "heard", []), (support.category, bool(support.shots[0].masks.any()))]

    def predict(self, query):
        self.heard.append(query.text)
        return Prediction(query.id, np.zeros((len(query.frames), *query.frames.shape[2:]), bool))


@pytest.mark.parametrize(
    ("text", "support"), list(itertools.product(["right", "empty", "other"], ["right", "other-category", "none"]))
)
def test_a_run_passes_them_on(small, tmp_path, text, support):
    method = Listener()
    options = {"manifest": small.manifest, "index": small.index, "workers": 0, "progress": False}
    run(method=method, method_name="listener", out=tmp_path / "run", text=text, support=support, **options)
    expected = []
    for episode in small.manifest.episodes:
        given = support_from(support, episode, small.manifest)
        expected.append(("", False) if support == "none" else (given.category, True))
        pairs = zip(episode.queries, episode.targets, strict=True)
        expected += [ask_with(text, episode, *pair, small.manifest, small.index).text for pair in pairs]
    assert method.heard == expected
