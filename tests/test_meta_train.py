"""Meta-training: what it writes, that it learns, that it can be continued, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewref.benchmark.meta_train import MetaTraining, draw, meta_options, meta_train
from fewref.benchmark.recipe import read_options
from fewref.benchmark.train import episode_source
from fewref.benchmark.training_record import base_videos
from fewref.episodes.errors import InputError
from fewref.episodes.readers import read_index
from fewref.episodes.synthetic import write_synthetic
from fewref.methods.adaptation import meta
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.cma.adapter import CMA
from fewref.methods.network_config import CONFIGS
from fewref.methods.shipped import CHECKPOINTS
from fewref.methods.weights import read_metadata
from fewref.splits import base_categories, load_split

needs_learn2learn = pytest.mark.skipif(not importlib.util.find_spec("learn2learn"), reason="make setup-meta adds it")
INIT = CHECKPOINTS / "cma-builtin-1" / "weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with built-in data of few videos and a configuration of a short training."""
    folder = tmp_path_factory.mktemp("meta")
    write_synthetic(folder / "set", videos_per_category=2, layouts=("youtube",), workers=1)
    values = json.loads((CONFIGS / "cma_tiny.json").read_text())
    values["text"]["tokenizer"] = str(CONFIGS / values["text"]["tokenizer"])
    values["train"] |= {"batch": 1, "size": [32, 48], "save_every": 1, "log_every": 1, "warmup": 0}
    values["train_from"] = {"own_support": 0.0, "half_weights": False}
    values["short_side"] = 32
    values["adapt"] = {"meta-sgd": {"steps": 2, "lr": 0.003}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def learn(place: Path, out: Path, strategy: str = "maml", **more: object) -> Path:
    chosen = {"steps": 2, "inner_steps": 1, "inner_lr": 1e-3, "init": INIT, "device": "cpu", "method": "cma", **more}
    config, root = str(place / "config.json"), place / "set"
    return meta_train(dataset="builtin", data_root=root, group="1", config=config, out=out, meta=strategy, **chosen)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "losses.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@needs_learn2learn
def test_it_writes_an_ordinary_checkpoint(place: Path, tmp_path: Path) -> None:
    weights = learn(place, tmp_path, "anil", first_order=False)
    CMA(weights=weights, config=str(place / "config.json"))
    start, found = load_file(INIT), load_file(weights)
    moved = {name.split(".")[0] for name in found if not torch.equal(found[name], start[name].float())}
    # The outer step trains the trunk as well, although the inner ones only see the head.
    assert {"backbone", "transformer", "controller", "support_qkv"} <= moved
    about = read_metadata(weights)
    told = {name: about[name] for name in ("method", "meta", "inner_steps", "inner_lr", "first_order", "steps")}
    assert told == {
        "method": "cma",
        "meta": "anil",
        "inner_steps": "1",
        "inner_lr": "0.001",
        "first_order": "False",
        "steps": "2",
    }
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["adaptation"] == {"meta": "anil", "inner_steps": 1, "inner_lr": 0.001, "first_order": False}
    wanted = "--meta anil --inner-steps 1 --inner-lr 0.001 --second-order --steps 2 --init cma-builtin-1"
    assert record["command"].endswith(wanted)
    assert record["steps"] == 2
    assert record["options"]["lr"] == pytest.approx(1e-4)  # a tenth, since it starts from a trained checkpoint
    assert len(record["loss_curve"]["loss_support_first"]) == 1
    assert record["base_categories"] == sorted(base_categories(load_split("builtin"), "1"))
    assert not meta.rates_path(weights).exists()


@needs_learn2learn
def test_rates_are_learned_and_go_on_where_they_were(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(place, tmp_path / "whole", "meta-sgd", inner_steps=None, inner_lr=None, steps=3)
    step = MetaTraining.outer_step

    def interrupted(self: MetaTraining, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTraining, "outer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(place, tmp_path / "parts", "meta-sgd", inner_steps=None, inner_lr=None, steps=3)
    parts = learn(place, tmp_path / "parts", "meta-sgd", inner_steps=None, inner_lr=None, steps=3)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    rates = load_file(meta.rates_path(whole))
    for first, second in ((whole, parts), (meta.rates_path(whole), meta.rates_path(parts))):
        one, other = load_file(first), load_file(second)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    # The configuration's rate is the start, and AdamW's first steps are a hundredth of it each.
    farthest = max((rate - 0.003).abs().max().item() for rate in rates.values())
    assert 0.01 * 0.003 < farthest < 0.03 * 0.003
    assert not any(name.startswith(("backbone", "text_encoder")) for name in rates)
    method = CMA(weights=whole, config=str(place / "config.json"))
    meta.check(method, AdaptOptions(strategy="meta-sgd"))


@needs_learn2learn
def test_another_training_is_not_continued(place: Path, tmp_path: Path) -> None:
    learn(place, tmp_path, steps=1)
    with pytest.raises(InputError, match="belongs to a training with another inner lr; "):
        learn(place, tmp_path, steps=1, inner_lr=0.5)
    with pytest.raises(InputError, match="belongs to a training with another inner strategy; "):
        learn(place, tmp_path, "anil", steps=1)
    with pytest.raises(InputError, match="--meta maml, step 1: inner step 2: the loss is (nan|inf); lower the"):
        learn(place, tmp_path, steps=1, inner_steps=2, inner_lr=1e30, resume=False)


def test_what_it_refuses(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--meta 'mamel' is unknown: did you mean 'maml'"):
        learn(place, tmp_path, "mamel")
    for lr in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=f"--inner-lr {lr}: give a positive number"):
            learn(place, tmp_path, inner_lr=lr)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="--meta maml trains in one process"):
            learn(place, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "learn2learn", None)
        with pytest.raises(InputError, match="--meta maml needs learn2learn .*setup-meta"):
            learn(place, tmp_path)


@needs_learn2learn
def test_a_control_has_nothing_to_learn(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="method empty cannot be trained"):
        learn(place, tmp_path, method="empty")


def test_episodes_are_of_base_categories_and_show_the_support(place: Path) -> None:
    index = read_index("builtin", place / "set")
    _, pools = base_videos(index, "1")
    values = {"batch": 3, "clip_frames": 1, "support_frames": 0, "augment": "tiny", "size": [32, 48], "save_every": 500}
    options = meta_options(read_options(values), inner_steps=4)
    assert (options.clip_frames, options.support_frames, options.save_every) == (2, 2, 100)
    source = episode_source(index, pools, options, seed=0)
    assert set(source.videos) <= set(base_categories(load_split("builtin"), "1"))
    pairs = draw(source, 0)
    assert len(pairs) == 3
    for query, support in pairs:
        for shot in (query, support):
            assert shot.frames.dtype == np.uint8
            assert shot.frames.shape == (2, 3, *shot.masks.shape[1:])
        assert support.masks.any()
    again = draw(source, 0)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(sum(pairs, ()), sum(again, ()), strict=True))
