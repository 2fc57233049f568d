"""TF2 beyond the golden cases: order of tracking, pairing, bootstrap, and the method behind adapt and predict."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewref.benchmark.recipe import read_options
from fewref.benchmark.train_data import EpisodeSource, PixelCache, batches, group_videos
from fewref.episodes import transforms
from fewref.episodes.errors import InputError
from fewref.episodes.readers import read_frame, read_index, read_masks
from fewref.episodes.sampler import training_pools
from fewref.episodes.synthetic import write_synthetic
from fewref.methods.base import UNTRAINED
from fewref.methods.check import check_method, make_case
from fewref.methods.cma.adapter import CMA
from fewref.methods.network_config import read_config
from fewref.methods.query_inference import resize_short_side
from fewref.methods.referformer.adapter import ReferFormer
from fewref.methods.tf2 import inference
from fewref.methods.tf2.adapter import TF2, TF2Released
from fewref.methods.tf2.pairing import keep_object, neighbours
from fewref.methods.tf2.tracking import MODES, given_frames, key_frame, schedule, track
from fewref.methods.weights import save_checkpoint
from fewref.splits import load_split

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
    batch = method.training_batch(shot)
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
    np.testing.assert_array_equal(method.training_batch(single).tracking[0, :, :, : size[0], : size[1]], own)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> EpisodeSource:
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, videos_per_category=2, layouts=("youtube",), workers=1)
    index = read_index("builtin", root)
    options = {"batch": 2, "clip_frames": 3, "support_frames": 0, "augment": "none", "tracking": 1.0}
    videos = group_videos(training_pools(index, load_split("builtin"), "1"))
    return EpisodeSource(PixelCache(index, 1 << 28), videos, read_options(options), 0)


def test_training_clips_come_with_the_object_of_their_neighbours(source, monkeypatch):
    shown = []
    inner = EpisodeSource._clip
    monkeypatch.setattr(EpisodeSource, "_clip", lambda self, *told: shown.append(told) or inner(self, *told))
    for step in range(4):
        shown.clear()
        clip, tracking = source.episode(step, 0)
        (video, expression, places), (again, same, before) = shown
        assert (again, same) == (video, expression)
        names = source.cache.index.videos[video].frames
        for place, other, image in zip(places, before, tracking.frames, strict=True):
            assert abs(place - other) == 1
            mask = read_masks(source.cache.index, video, [names[other]], expression.objects)[0]
            frame = read_frame(source.cache.index, video, names[other])
            np.testing.assert_array_equal(image, np.where(mask[..., None], frame, 0))
        assert not np.array_equal(clip.frames, tracking.frames)


def test_tracking_images_are_augmented_on_their_own(source, monkeypatch):
    """The clip is drawn as without them; over some episodes one stream is flipped and the other is not."""
    tiny = replace(source, options=replace(source.options, augment="tiny"))
    flips = []
    monkeypatch.setattr(transforms, "flip", lambda sample, *told: flips.append(len(sample.frames)) or sample)
    counts = set()
    for step in range(8):
        flips.clear()
        clip, _ = tiny.episode(step, 1)
        counts.add(len(flips))
        plain = replace(tiny, options=replace(tiny.options, tracking=0.0)).episode(step, 1)
        assert len(plain) == 1
        np.testing.assert_array_equal(plain[0].frames, clip.frames)
    assert 1 in counts


def test_a_share_of_the_steps_has_tracking_images(source, method):
    half = replace(source, options=replace(source.options, tracking=0.5))
    seen = [batch for _, batch in batches(half, method.tokenizer, 0, 8)]
    assert [batch.tracking is not None for batch in seen] == [half.tracks(step) for step in range(8)]
    assert {batch.tracking is None for batch in seen} == {True, False}
    tracked = next(batch for batch in seen if batch.tracking is not None)
    assert tracked.tracking.dtype == torch.uint8
    assert tracked.tracking.shape[:3] == (2, 3, 3)
    plain = replace(tracked, tracking=None, tracking_padding=None)
    with torch.no_grad():
        with_images, without = (method.network.episode(batch)["pred_masks"] for batch in (tracked, plain))
    assert not torch.allclose(with_images, without, atol=1e-3)


def test_the_paper_configuration_has_the_parameters_of_referformer():
    with torch.device("meta"):
        network = TF2.build(read_config("tf2", "paper"))
        other = ReferFormer.build(read_config("referformer", "paper"))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}
    sizes = {name: p.numel() * (1 + 1j * p.requires_grad) for name, p in network.named_parameters()}
    rest = sum(size for name, size in sizes.items() if not name.startswith("text_encoder."))
    assert rest == 51_616_575 + 51_394_175j


def test_half_precision_is_close(method):
    case = case_of(4)
    half = TF2(weights=UNTRAINED, window=3, precision="bf16")
    assert half.predict(case.query).confidence == pytest.approx(method.predict(case.query).confidence, abs=0.02)


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
