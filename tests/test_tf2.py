"""TF2 beyond the golden cases: order of tracking, pairing, bootstrap, and the method behind adapt and predict."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewref.episodes.errors import InputError
from fewref.methods.base import UNTRAINED
from fewref.methods.check import check_method, make_case
from fewref.methods.cma.adapter import CMA
from fewref.methods.query_inference import resize_short_side
from fewref.methods.referformer.adapter import ReferFormer
from fewref.methods.tf2 import inference
from fewref.methods.tf2.adapter import TF2, TF2Released
from fewref.methods.tf2.pairing import keep_object, neighbours
from fewref.methods.tf2.tracking import MODES, given_frames, key_frame, schedule, track
from fewref.methods.weights import save_checkpoint

SIZE = (48, 64)


def case_of(frames: int, seed: int = 0):
    return make_case(seed, "dog", SIZE, frames=frames)


@pytest.fixture(scope="module")
def method() -> TF2:
    return TF2(weights=UNTRAINED, window=3)


def test_order_of_tracking():
    assert schedule(7, 3, "released") == [(5, 3), (6, 5), (1, 3), (0, 1)]
    assert schedule(7, 3, "full") == [(4, 3), (5, 4), (6, 5), (2, 3), (1, 2), (0, 1)]
    assert schedule(1, 0, "full") == schedule(1, 0, "released") == schedule(2, 1, "released") == []
    with pytest.raises(InputError, match="tracking mode 'ful' is unknown; did you mean 'full'"):
        schedule(3, 0, "ful")
    with pytest.raises(ValueError, match="key frame 3"):
        schedule(3, 3, "full")


@pytest.mark.parametrize("mode", MODES)
def test_every_frame_is_given_or_tracked_once_from_a_frame_that_is_known(mode):
    for frames in range(1, 9):
        for key in range(frames):
            known = set(given_frames(frames, key, mode))
            for frame, last in schedule(frames, key, mode):
                assert last in known
                assert frame not in known
                known.add(frame)
            assert known == set(range(frames))


def test_the_surest_frame_is_the_key_frame_and_the_earliest_of_equals():
    assert key_frame([0.1, 0.7, 0.2, 0.7]) == 1


def test_tracking_shows_the_tracker_the_object_alone():
    frames = np.random.default_rng(0).integers(1, 255, (4, 3, 5, 6), dtype=np.uint8)
    masks = np.zeros((4, 5, 6), bool)
    masks[1, 2:, :3] = True
    masks[3] = True  # of no given frame, so it must not be looked at
    seen = {}

    def tracker(frame: int, last: int, image: np.ndarray) -> np.ndarray:
        seen[frame] = image
        found = np.zeros((5, 6), bool)
        if frame != 2:
            found[frame, last] = True
        return found

    found = track(frames, masks, 1, tracker)
    assert [np.argwhere(item).tolist() for item in found[[0, 3]]] == [[[0, 1]], [[3, 2]]]
    np.testing.assert_array_equal(seen[0], frames[1] * masks[1])
    np.testing.assert_array_equal(seen[2], frames[1] * masks[1])
    assert not seen[3].any()  # frame 2 was found empty: nothing but black is left


def test_pairs():
    assert neighbours(range(6), 6) == [1, 0, 3, 2, 5, 4]
    assert neighbours(range(5), 5) == [1, 0, 3, 2, 3]
    assert neighbours([0], 1) == [0]
    frames = np.full((2, 3, 4, 4), 9, np.uint8)
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 1, 2] = True
    kept = keep_object(frames, masks)
    assert kept.dtype == np.uint8
    assert kept.sum() == 27
    assert (kept[0, :, 1, 2] == 9).all()


@pytest.mark.parametrize("cls", [TF2, TF2Released])
def test_keeps_the_contract(cls):
    assert [item for item in check_method(cls, weights=UNTRAINED) if not item.passed] == []


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_clips_of_any_length_give_equal_answers_twice(method, frames):
    case = case_of(frames)
    method.adapt(case.support)
    first, _, again = (method.predict(query) for query in (case.query, case_of(2, seed=1).query, case.query))
    assert first.masks.shape == (frames, *SIZE)
    assert 0 <= first.confidence <= 1
    assert first.confidence == again.confidence
    np.testing.assert_array_equal(first.masks, again.masks)
    np.testing.assert_array_equal(first.input_masks, again.input_masks)


@torch.inference_mode()
def test_the_bootstrap_is_referformers_answer(method):
    """Frame by frame, for the two share every weight; a key frame keeps it, and the rest is tracked."""
    case, other = case_of(5), ReferFormer(weights=UNTRAINED, window=3)
    other.network.load_state_dict(method.network.state_dict())
    plain, tracked = other.answer(case.query), method.answer(case.query)
    resized = resize_short_side(case.query.frames, method.short_side)
    start, streams = inference.bootstrap(method.network, resized, method.encode_text(case.query.text), 3)
    torch.testing.assert_close(start.logits, plain.logits)
    assert start.size == plain.size
    assert len(streams) == 5
    assert start.key == tracked.key
    torch.testing.assert_close(tracked.logits[start.key], plain.logits[start.key])
    assert not torch.allclose(tracked.logits, plain.logits, atol=1e-3)


@torch.inference_mode()
def test_features_computed_once_are_those_of_each_frame(method):
    """The streams cut out of a clip equal those of its frames one by one, as the released program computes them."""
    frames, text = resize_short_side(case_of(3).query.frames, method.short_side), method.encode_text("the red one")
    for index, cut in enumerate(inference.split(inference.encode(method.network, frames, text))):
        own = inference.encode(method.network, frames[[index]], text)
        sizes = torch.tensor([frames.shape[-2:]])
        got, wanted = (method.network.decode(stream, sizes, text, own) for stream in (cut, own))
        for name in ("pred_logits", "pred_boxes", "pred_masks"):
            torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_tracking_image_without_an_object_is_black_and_no_fault(method, monkeypatch, mode):
    """Where the bootstrap finds nothing the sentence is all that is left."""
    images, real = [], inference.encode

    def encode(net, frames, text):
        images.append(frames)
        return real(net, frames, text)

    monkeypatch.setattr(method, "mode", mode, raising=False)
    monkeypatch.setattr(inference, "encode", encode)
    monkeypatch.setattr(inference, "cut", lambda logits, size: np.zeros((len(logits), *size), bool))
    prediction = method.predict(case_of(4).query)
    tracked = [image for image in images if len(image) == 1 and not image.any()]
    expected = schedule(4, method.answer(case_of(4).query).key, mode)
    assert len(tracked) == len(expected)
    assert prediction.masks.shape == (4, *SIZE)


def test_loss_of_a_support_clip_uses_its_neighbours(method):
    """In eval mode the loss follows from the shot; with another mask the tracking images differ, too."""
    shot = case_of(4).support.shots[0]
    batch = method.batch(shot)
    size = method.sample(shot).size
    before = [1, 0, 3, 2]
    shown = resize_short_side(shot.frames[before] * shot.masks[before][:, None].astype(np.uint8), method.short_side)
    np.testing.assert_array_equal(batch.tracking[0, :, :, : size[0], : size[1]], shown)
    assert batch.tracking_padding.shape == batch.padding.shape
    loss = method.loss(shot, [shot])
    assert loss.shape == ()
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in method.network.transformer.parameters())
    method.network.zero_grad(set_to_none=True)
    single = replace(shot, frames=shot.frames[:1], masks=shot.masks[:1])
    own = resize_short_side(single.frames * single.masks[:, None].astype(np.uint8), method.short_side)
    np.testing.assert_array_equal(method.batch(single).tracking[0, :, :, : size[0], : size[1]], own)


def test_checkpoints(tmp_path):
    """One of ReferFormer fits; one of CMA is refused in one line."""
    path = tmp_path / "referformer.safetensors"
    setup = ReferFormer.training("tiny")
    save_checkpoint(path, setup.network.state_dict(), {}, torch.float32, setup.tied)
    loaded = TF2(weights=path).network.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in setup.network.state_dict().items())
    started = TF2.training("tiny", path).network.state_dict()
    assert all(torch.equal(value, started[name]) for name, value in setup.network.state_dict().items())
    setup = CMA.training("tiny")
    save_checkpoint(tmp_path / "cma.safetensors", setup.network.state_dict(), {}, torch.float32, setup.tied)
    with pytest.raises(InputError, match="cma.safetensors: .*CMA") as error:
        TF2(weights=tmp_path / "cma.safetensors")
    assert "\n" not in str(error.value)
