"""Training: samples keyed by step and item, the loop, continuing it, many processes."""

from __future__ import annotations

import csv
import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewref.benchmark.recipe import read_options
from fewref.benchmark.train import train
from fewref.benchmark.train_data import EpisodeSource, PixelCache, batches, group_videos
from fewref.episodes.errors import InputError
from fewref.episodes.readers import DatasetIndex, read_index, read_masks
from fewref.episodes.sampler import training_pools
from fewref.episodes.synthetic import write_synthetic
from fewref.episodes.transforms import clip_targets
from fewref.methods.batch import collate
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.query_checkpoint import TIED
from fewref.methods.referformer.clip_sampling import sample_clip
from fewref.methods.text import build_text_encoder
from fewref.splits import load_split

VOCABULARY = 97
RECIPE = {
    "lr": 1e-3,
    "lr_backbone": 1e-3,
    "lr_text": 1e-3,
    "batch": 2,
    "clip_frames": 2,
    "support_frames": 2,
    "steps": 60,
    "schedule": "cosine",
    "warmup": 2,
    "clip_norm": 1.0,
    "augment": "tiny",
    "size": [64, 96],
    "log_every": 2,
    "save_every": 3,
    "workers": 1,
}


def tokenize(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token per word, the same on every machine."""
    rows = [[3 + sum(word.encode()) % (VOCABULARY - 3) for word in sentence.split()] for sentence in sentences]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=1)
    return ids, (ids != 1).long()


def small_network(dropout: float = 0.1) -> CMANet:
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return CMANet(
        backbone=build_backbone("tiny_resnet"),
        text_encoder=build_text_encoder(text),
        hidden=32,
        heads=4,
        ffn=64,
        encoder_layers=1,
        decoder_layers=2,
        dropout=dropout,
        freeze_backbone=False,
        freeze_text=False,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, videos_per_category=4, layouts=("youtube",), workers=1)
    return read_index("builtin", root)


@pytest.fixture(scope="module")
def pools(index: DatasetIndex) -> dict:
    return training_pools(index, load_split("builtin"), "1")


def source(index: DatasetIndex, pools: dict, seed: int = 0, **changes: object) -> EpisodeSource:
    options = read_options({**RECIPE, **changes})
    return EpisodeSource(PixelCache(index, options.cache_bytes, options.size), group_videos(pools), options, seed)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[str, ...]]:
    """Everything in the table but the times."""
    return [tuple(value for name, value in row.items() if name != "seconds") for row in rows(folder)]


def test_loss_falls(index: DatasetIndex, pools: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = {category: pools[category] for category in sorted(pools)[:2]} | {"unicorn": pools["dog"][:1]}
    train(network=small_network(), tokenizer=tokenize, index=index, pools=few, config=RECIPE, out=tmp_path, tied=TIED)
    assert "not trained on, having fewer than two videos: unicorn" in capsys.readouterr().err
    totals = [float(row["total"]) for row in rows(tmp_path)]
    assert len(totals) == 60
    assert np.mean(totals[-10:]) < 0.75 * np.mean(totals[:5])
    for term in ("loss_ce", "loss_dice", "loss_bbox"):
        values = [float(row[term]) for row in rows(tmp_path)]
        assert np.mean(values[-10:]) < np.mean(values[:10]), term


def test_the_share_of_own_supports(index: DatasetIndex, pools: dict) -> None:
    """With own_support=1 the support shows the query's own object; without it never its video."""
    own = source(index, pools, own_support=1.0, augment="none", support_frames=16, clip_frames=16)
    for item in range(6):
        query, support = own.episode(0, item)
        assert query.text == support.text
        np.testing.assert_array_equal(query.masks, support.masks)
    plain = source(index, pools, augment="none", support_frames=16, clip_frames=16)
    pairs = [plain.episode(0, item) for item in range(6)]
    assert not any(np.array_equal(query.frames, support.frames) for query, support in pairs)


def test_continuing_equals_an_unbroken_training(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    common = {"tokenizer": tokenize, "index": index, "pools": pools, "config": RECIPE, "tied": TIED}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(network=small_network(), out=whole, steps=6, **common)
    train(network=small_network(), out=broken, steps=3, **common)
    with open(broken / "losses.csv", "a") as file:
        file.write("4,0,this row is of a step that was lost with the killed process\n5,0.1,half a ro")
    torch.manual_seed(123)  # whatever happened in between does not matter
    train(network=small_network(), out=broken, steps=6, **common)
    first, second = load_file(whole / "weights.safetensors"), load_file(broken / "weights.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(whole) == losses(broken)
    assert [row["step"] for row in rows(broken)] == list("123456")


def test_continuing_with_upstream_gradients(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    """The affinity projections are in no group, so their gradients add up over the steps, across a break too."""
    config = {**RECIPE, "faithful": "upstream", "save_every": 1}
    common = {"tokenizer": tokenize, "index": index, "pools": pools, "config": config, "tied": TIED}
    before = {name: value.clone() for name, value in small_network().state_dict().items()}
    train(network=small_network(), out=tmp_path / "whole", steps=3, **common)
    for steps in (1, 3):
        train(network=small_network(), out=tmp_path / "broken", steps=steps, **common)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    after, again = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert torch.equal(after["query_qkv.Key.weight"], before["query_qkv.Key.weight"])
    assert not torch.equal(after["layer_norm.weight"], before["layer_norm.weight"])


def test_fixed_recipe_trains_the_affinity(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(
        network=network, tokenizer=tokenize, index=index, pools=pools, config=RECIPE, out=tmp_path, steps=1, tied=TIED
    )
    unchanged = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged
    assert not [name for name in unchanged if name.startswith(("query_qkv", "conv_q", "support_qkv.Key"))]


def test_another_training_is_not_continued(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    common = {"tokenizer": tokenize, "index": index, "pools": pools, "out": tmp_path, "tied": TIED, "steps": 1}
    train(network=small_network(), config=RECIPE, **common)
    with pytest.raises(InputError, match="another lr, seed"):
        train(network=small_network(), config={**RECIPE, "lr": 1e-4}, seed=1, **common)
    train(network=small_network(), config={**RECIPE, "lr": 1e-4}, seed=1, resume=False, **common)
    assert len(rows(tmp_path)) == 1
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be continued from"):
        train(network=small_network(), config=RECIPE, **common)


def test_a_loss_that_is_no_number_stops_the_training(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    network = small_network()
    common = {"network": network, "tokenizer": tokenize, "index": index, "pools": pools, "out": tmp_path, "tied": TIED}
    train(config=RECIPE, steps=3, **common)
    saved = (tmp_path / "last.pt").read_bytes()
    calls = []

    def spoil(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(output)
        return output * math.nan if len(calls) > 2 else output

    network.controller.register_forward_hook(spoil)
    with pytest.raises(InputError, match="loss of step 6 is not finite"):
        train(config=RECIPE, steps=9, **common)
    assert (tmp_path / "last.pt").read_bytes() == saved


def test_final_weights_carry_their_origin(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    from fewref.methods.weights import read_metadata

    config = {**RECIPE, "half_weights": True}
    path = train(
        network=small_network(),
        tokenizer=tokenize,
        index=index,
        pools=pools,
        config=config,
        out=tmp_path,
        seed=7,
        steps=1,
        tied=TIED,
        metadata={"group": "1"},
    )
    metadata = read_metadata(path)
    assert metadata["seed"] == "7"
    assert metadata["steps"] == "1"
    assert metadata["group"] == "1"
    assert metadata["command"]
    assert {value.dtype for value in load_file(path).values() if value.is_floating_point()} == {torch.float16}


def test_samples_follow_from_step_and_item(index: DatasetIndex, pools: dict) -> None:
    one = [batch for _, batch in batches(source(index, pools), tokenize, 0, 4)]
    later = [batch for _, batch in batches(source(index, pools, workers=3, cache_bytes=1), tokenize, 2, 4)]
    shares = [list(batches(source(index, pools), tokenize, 2, 4, rank, 2)) for rank in range(2)]
    for number in range(2):
        assert torch.equal(one[2 + number].frames, later[number].frames)
        joined = torch.cat([share[number][1].frames for share in shares])
        assert torch.equal(one[2 + number].frames, joined)
    assert not torch.equal(one[0].frames, one[1].frames)
    other = next(batches(source(index, pools, seed=1), tokenize, 0, 1))[1]
    assert not torch.equal(one[0].frames, other.frames)


def test_episodes_are_of_one_category_and_show_the_support(index: DatasetIndex, pools: dict, monkeypatch) -> None:
    drawn = source(index, pools, augment="none")
    novel = set(load_split("builtin").groups["1"])
    counts: dict[str, int] = {}
    seen: list[tuple[str, str]] = []
    inner = EpisodeSource._clip

    def watch(self, video, expression, places):
        seen.append((expression.category, video))
        return inner(self, video, expression, places)

    monkeypatch.setattr(EpisodeSource, "_clip", watch)
    rounds = len(drawn.videos)
    for step in range(rounds // 2):
        for item in range(2):
            seen.clear()
            query, support = drawn.episode(step, item)
            category = drawn.category(step, item)
            counts[category] = counts.get(category, 0) + 1
            assert category not in novel
            assert {name for name, _ in seen} == {category}
            assert seen[0][1] not in [video for _, video in seen[1:]]
            assert support.masks[len(support.masks) // 2].any()
            np.testing.assert_array_equal(query.valid, clip_targets(query.masks)[1])
            assert category.replace("_", " ") in query.text
            assert category.replace("_", " ") in support.text
    assert set(counts.values()) == {1}, "every class once before any comes again"


def test_upstream_order_takes_class_after_class(index: DatasetIndex, pools: dict) -> None:
    drawn = source(index, pools, faithful="upstream", samples_per_class=3)
    names = list(drawn.videos)
    assert [drawn.category(step, item) for step in range(4) for item in range(2)] == [
        *[names[0]] * 3,
        *[names[1]] * 3,
        *[names[2]] * 2,
    ]


def test_cache_forgets_and_resizes(index: DatasetIndex) -> None:
    video = next(iter(index.videos.values()))
    names, objects = video.frames[:3], tuple(video.objects)[:1]
    cache = PixelCache(index, limit=96 * 128 * 3 * 2)
    first = cache.frames(video.name, names)
    assert sum(pixels.nbytes for pixels in cache._kept.values()) <= cache.limit
    np.testing.assert_array_equal(first, cache.frames(video.name, names))
    np.testing.assert_array_equal(
        cache.masks(video.name, names, objects), read_masks(index, video.name, names, objects)
    )
    small = PixelCache(index, limit=1 << 20, size=(32, 48))
    assert small.frames(video.name, names).shape == (3, 32, 48, 3)
    assert small.masks(video.name, names, objects).shape == (3, 32, 48)


def test_batch_is_padded_to_multiples_of_32(index: DatasetIndex, pools: dict) -> None:
    drawn = source(index, pools, size=(40, 70), augment="none")
    batch = collate([drawn.episode(0, 0), drawn.episode(0, 1)], tokenize)
    assert batch.frames.shape == (2, 2, 3, 64, 96)
    assert batch.sizes.tolist() == [[40, 70]] * 2
    assert not batch.padding[..., :40, :70].any()
    assert batch.padding[..., 40:, :].all()
    assert batch.padding[..., 70:].all()
    assert batch.support_masks[0].shape == (2, 40, 70)
    frames = normalise_padded(batch.frames, batch.padding)
    assert not frames.masked_select(batch.padding[:, :, None].expand_as(frames)).any()
    value = batch.frames[0, 0, :, 5, 7].double() / 255
    wanted = (value - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(frames[0, 0, :, 5, 7].double(), wanted, atol=1e-6, rtol=0)


def test_classes_need_two_videos() -> None:
    with pytest.raises(InputError, match="two videos"):
        group_videos({"cat": (("a", None), ("a", None)), "dog": ()})
    assert list(group_videos({"cat": (("b", 1), ("a", 2), ("b", 3)), "dog": (("a", 1),)})) == ["cat"]
    assert group_videos({"cat": (("b", 1), ("a", 2), ("b", 3))})["cat"] == {"a": (2,), "b": (1, 3)}


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_train as t
index = t.read_index("builtin", Path({root!r}))
t.one_step(index, t.training_pools(index, t.load_split("builtin"), "1"), Path({out!r}))
"""
UNEVEN = 42  # a seed whose first two query clips differ in the number of valid frames


def one_step(index: DatasetIndex, pools: dict, out: Path) -> None:
    """A step without dropout and clipping."""
    common = {"tokenizer": tokenize, "index": index, "pools": pools, "config": {**RECIPE, "clip_norm": 0}}
    train(network=small_network(0.0), out=out, seed=UNEVEN, steps=1, tied=TIED, **common)


def test_two_processes_take_the_same_step_as_one(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    """Sharing a batch changes neither loss nor gradients but for rounding, the loss's normaliser included.

    AdamW's running mean after one step is a tenth of the gradient; weights would hide a factor on the gradients.
    """
    batch = next(batches(source(index, pools, seed=UNEVEN), tokenize, 0, 1))[1]
    assert batch.targets[0]["valid"].sum() != batch.targets[1]["valid"].sum()
    root = next(parent for parent in [index.root, *index.root.parents] if (parent / "mini-ref-youtube-vos").is_dir())
    script = WORKER.format(tests=str(Path(__file__).parent), root=str(root), out=str(tmp_path / "two"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,  # "" on the path of -c then leads nowhere
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    one_step(index, pools, tmp_path / "one")
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    one, two = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["optimiser"]["state"] for name in ("one", "two")
    )
    assert any(state["exp_avg"].norm() > 0.1 for state in one.values())
    for key, state in one.items():
        difference = (state["exp_avg"] - two[key]["exp_avg"]).norm()
        assert difference <= 1e-3 * state["exp_avg"].norm() + 1e-5, key
    first, second = (float(rows(tmp_path / name)[0]["total"]) for name in ("one", "two"))
    assert first == pytest.approx(second, rel=1e-4)


def test_a_batch_must_be_shared_evenly(index: DatasetIndex, pools: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "batch: 2 episodes cannot be shared by 3 processes"
    with pytest.raises(InputError, match=re.escape(message)):
        train(network=small_network(), tokenizer=tokenize, index=index, pools=pools, config=RECIPE, out=tmp_path)


def test_scattered_clips_are_drawn_as_referformer_draws_them(index: DatasetIndex, pools: dict) -> None:
    clips = source(index, pools, augment="none", support_frames=0, clip_frames=5, clips="scattered")
    twin, rng = np.random.default_rng(3), np.random.default_rng(3)
    for video, entry in index.videos.items():
        centre = int(twin.integers(len(entry.frames)))
        wanted = sample_clip(len(entry.frames), centre, 5, random.Random(int(twin.integers(2**62))))
        assert clips._places(rng, video, 5, scattered=True) == wanted
    (query,) = clips.episode(0, 0)
    assert len(query.frames) == 5
    with pytest.raises(InputError, match="training option clips: a scattered clip has 1 frame or at least 3, not 2"):
        source(index, pools, clips="scattered", clip_frames=2)
