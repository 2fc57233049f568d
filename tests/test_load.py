import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewref.episodes.errors import InputError
from fewref.episodes.load import (
    load_queries,
    load_query,
    load_shot,
    load_support,
    load_truth,
    load_truths,
    prefetch,
)
from fewref.episodes.readers import read_frame, read_index
from fewref.episodes.synthetic import write_synthetic
from fewref.episodes.types import Clip, Query, Shot, SupportSet, Target


@pytest.fixture
def index(tmp_path):
    write_synthetic(tmp_path / "data", layouts=("davis",), size=(64, 80), frames=4, workers=1)
    return read_index("builtin-davis", tmp_path / "data")


@pytest.fixture
def shot(index) -> Shot:
    video = next(iter(index.videos.values()))
    frames = video.frames + video.frames[-1:] * 2  # a window longer than the video repeats its last frame
    return Shot(Clip(index.dataset, video.name, frames), video.expressions[0])


def label_file(index, shot: Shot, frame: str) -> Path:
    return index.trees[shot.clip.video].masks / shot.clip.video / f"{frame}.png"


def test_a_shot_gets_frames_and_masks(index, shot):
    loaded = load_shot(index, shot)
    assert loaded == shot  # pixels do not take part in comparison
    assert loaded.frames.dtype == np.uint8
    assert loaded.frames.shape == (6, 3, 64, 80)
    assert loaded.frames.flags.c_contiguous
    assert loaded.frames.flags.writeable
    assert loaded.masks.dtype == bool
    assert loaded.masks.shape == (6, 64, 80)
    for t, frame in enumerate(shot.clip.frames):
        assert np.array_equal(loaded.frames[t].transpose(1, 2, 0), read_frame(index, shot.clip.video, frame))
        with Image.open(label_file(index, shot, frame)) as image:
            assert np.array_equal(loaded.masks[t], np.asarray(image) == int(shot.expression.objects[0]))
    support = load_support(index, SupportSet("dog", (shot, shot)))
    assert [s.masks.sum() for s in support.shots] == [loaded.masks.sum()] * 2


def test_what_a_method_does_to_its_pixels_reaches_no_other_reader(index, shot):
    first = load_shot(index, shot)
    kept_frames, kept_masks = first.frames.copy(), first.masks.copy()
    first.frames[:] = 0
    first.masks[:] = True
    again = load_shot(index, shot)
    assert np.array_equal(again.frames, kept_frames)
    assert np.array_equal(again.masks, kept_masks)


def test_a_query_opens_no_mask_and_the_truth_is_asked_for_apart(index, shot):
    clip = Clip(index.dataset, shot.clip.video, index.videos[shot.clip.video].frames)
    query = Query("q", clip, shot.expression.text)
    truth = load_truth(index, query, Target("q", shot.expression))
    assert np.array_equal(truth, load_shot(index, shot).masks[:4])
    with pytest.raises(InputError, match="query other"):
        load_truth(index, query, Target("other", shot.expression))
    for frame in clip.frames:
        label_file(index, shot, frame).write_text("not a mask")
    fresh = read_index("builtin-davis", index.root)
    assert load_query(fresh, query).frames.shape == (4, 3, 64, 80)
    with pytest.raises(InputError, match="png"):
        load_truth(fresh, query, Target("q", shot.expression))


def test_queries_about_one_clip_share_their_frames_and_equal_truths(index):
    video = next(video for video in index.videos.values() if len(video.expressions) > 2)
    said = (
        video.expressions[0],
        video.expressions[0],
        next(item for item in video.expressions if item.objects != video.expressions[0].objects),
    )
    queries = [Query(f"q{n}", Clip(index.dataset, video.name, video.frames), item.text) for n, item in enumerate(said)]
    targets = [Target(f"q{n}", item) for n, item in enumerate(said)]
    loaded, truths = load_queries(index, queries), load_truths(index, queries, targets)
    assert list(loaded) == queries
    assert {id(query.frames) for query in loaded} == {id(loaded[0].frames)}
    assert truths[0] is truths[1]
    for query, target, truth in zip(loaded, targets, truths, strict=True):
        assert np.array_equal(truth, load_truth(index, query, target))
        assert np.array_equal(query.frames, load_query(index, query).frames)
    assert not np.array_equal(truths[0], truths[2])
    with pytest.raises(InputError, match="target of query q0 was given for query q1"):
        load_truths(index, queries[1:2], targets[:1])


def test_masks_of_another_size_than_the_frames(index, shot):
    for frame in shot.clip.frames:
        Image.fromarray(np.ones((64, 64), np.uint8)).save(label_file(index, shot, frame))
    query = Query("q", shot.clip, "")
    for load in (lambda: load_shot(index, shot), lambda: load_truth(index, query, Target("q", shot.expression))):
        with pytest.raises(InputError, match=r"mask is \(64, 64\), the image \(64, 80\)"):
            load()


def test_a_truncated_frame_is_named(index, shot):
    path = index.trees[shot.clip.video].images / shot.clip.video / f"{shot.clip.frames[2]}.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=f"{shot.clip.frames[2]}.jpg: truncated or damaged; fetch it again"):
        load_query(index, Query("q", shot.clip, ""))


def test_a_clip_of_another_dataset_is_refused(index, shot):
    with pytest.raises(InputError, match="mini-davis"):
        load_query(index, Query("q", Clip("mini-davis", shot.clip.video, shot.clip.frames), ""))


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_keeps_the_order(workers):
    delays = [0.03, 0.0, 0.02, 0.0, 0.01]
    assert list(prefetch(range(5), lambda k: (time.sleep(delays[k]), k)[1], workers)) == [0, 1, 2, 3, 4]


def test_prefetch_loads_the_next_item_while_the_current_is_used():
    begun = [threading.Event() for _ in range(4)]
    items = prefetch(range(4), lambda k: (begun[k].set(), k)[1])
    assert next(items) == 0
    assert begun[1].wait(5)
    assert not begun[2].is_set()
    items.close()


def test_prefetch_raises_at_the_items_turn():
    def load(k: int) -> int:
        if k == 1:
            raise InputError("item 1")
        return k

    items = prefetch(range(3), load)
    assert next(items) == 0
    with pytest.raises(InputError, match="item 1"):
        next(items)
