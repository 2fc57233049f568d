"""Checkpoint files: what loads, what is refused and in which words, and what is written."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from fewref.episodes.errors import InputError
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.query_checkpoint import TIED, load_network, start_from
from fewref.methods.weights import (
    DROPPABLE,
    load_checkpoint,
    load_strict,
    looks_like,
    read_metadata,
    save_checkpoint,
    sha256,
)


class Hostile:
    """Unpickled in the ordinary way, this creates a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.flag}",)


def upstream_file(path: Path, legacy: bool, **extra: object) -> nn.Module:
    """Write what an upstream training script writes: weights beside optimiser, schedule, epoch and options."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5])
    network(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    options = argparse.Namespace(lr=1e-4, lr_drop=[3, 5], backbone="resnet50", resume=None, use_dab=True)
    content = {"optimizer": optimiser.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 23, "args": options}
    content |= {"model": network.state_dict(), **extra}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return network


def cma(seed: int = 0, **options: object) -> CMANet:
    """A CMA network of a few thousand weights, all of them random."""
    torch.manual_seed(seed)
    text = nn.Linear(4, 4)
    text.config = SimpleNamespace(hidden_size=4)
    sizes = {"hidden": 32, "heads": 4, "ffn": 8, "encoder_layers": 1, "decoder_layers": 2} | options
    network = CMANet(backbone=build_backbone("tiny_resnet", channels=(8, 8, 8, 8)), text_encoder=text, **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("legacy", [True, False])
def test_an_upstream_file_loads_with_its_namespace(tmp_path, legacy):
    network = upstream_file(tmp_path / "checkpoint.pth", legacy)
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert equal(state, dict(network.state_dict()))
    fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_strict(fresh, state, DROPPABLE, tmp_path / "checkpoint.pth")
    assert equal(dict(fresh.state_dict()), state)
    assert read_metadata(tmp_path / "checkpoint.pth") == {}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["model", "args"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, legacy, place):
    flag, path = tmp_path / "ran", tmp_path / "hostile.pth"
    hostile = Hostile(flag) if place == "model" else argparse.Namespace(lr=Hostile(flag))
    upstream_file(path, legacy, **{place: hostile})
    with pytest.raises(InputError, match=r"hostile.pth: refused, since it holds .*system") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not flag.exists()
    torch.load(path, weights_only=False)  # shows that the file would have done harm
    assert flag.exists()


def test_a_bare_pickle_and_a_pickled_module_are_refused(tmp_path):
    flag = tmp_path / "ran"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Hostile(flag)}))
    with pytest.raises(InputError, match="bare.pth: not a checkpoint"):
        load_checkpoint(tmp_path / "bare.pth")
    assert not flag.exists()
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(InputError, match=r"refused, since it holds .*torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(tmp_path / "module.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.002, 0.5, 0.99])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, kind, part):
    whole, path = tmp_path / "whole", tmp_path / f"cut.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_checkpoint(whole, nn.Linear(30, 20).state_dict())
    else:
        upstream_file(whole, kind == "legacy")
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match=r"cut\.\w+: not a checkpoint, or damaged or cut short") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds no state dict"), ({}, "holds no state dict"), ({"model": {"a": 1}}, "'a' is a int, not a tensor")],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=f"other.pth: {words}"):
        load_checkpoint(tmp_path / "other.pth")


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404: the file that you asked for is not here</html>")
    with pytest.raises(InputError, match="page.pth: not a checkpoint"):
        load_checkpoint(tmp_path / "page.pth")
    for read in (load_checkpoint, sha256, read_metadata):
        with pytest.raises(InputError, match="none.pth: no such file"):
            read(tmp_path / "none.pth")
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path)


def test_names_that_may_be_dropped_are_dropped_unless_the_network_has_them():
    network = nn.Linear(2, 2)
    extra = {"text_encoder.embeddings.position_ids": torch.arange(3), "a.total_ops": torch.ones(1)}
    load_strict(network, network.state_dict() | extra, DROPPABLE, Path("f"))
    with pytest.raises(InputError, match=r"f: does not fit this network: 2 unexpected \(text_encoder"):
        load_strict(network, network.state_dict() | extra, (), Path("f"))
    network.register_buffer("total_ops", torch.zeros(1))
    load_strict(network, network.state_dict() | {"total_ops": torch.ones(1)}, DROPPABLE, Path("f"))
    assert network.total_ops == 1


def test_every_kind_of_misfit_is_named_and_nothing_is_loaded():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: item + 1 for name, item in network.state_dict().items()}
    before = {name: item.clone() for name, item in network.state_dict().items()}
    del state["0.bias"]
    state |= {"extra": torch.ones(1), "0.weight": torch.ones(2, 3), "1.num_batches_tracked": torch.tensor(0.5)}
    with pytest.raises(InputError) as error:
        load_strict(network, state, (), Path("weights.pth"))
    message = str(error.value)
    assert message.startswith("weights.pth: does not fit this network: 1 missing (0.bias); 1 unexpected (extra); 2 of ")
    assert "0.weight (2, 3) for (2, 2)" in message
    assert "1.num_batches_tracked torch.float32 for torch.int64" in message
    assert equal(dict(network.state_dict()), before)


def test_long_lists_of_names_are_cut_with_their_count():
    state = {f"n{index}": torch.ones(1) for index in range(7)}
    with pytest.raises(InputError, match=r"7 unexpected \(n0, n1, n2, \.\.\.\)"):
        load_strict(nn.Identity(), state, (), Path("f"))


def test_half_precision_round_trip_with_metadata(tmp_path):
    path, network = tmp_path / "deep/er/net.safetensors", nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save_checkpoint(path, network.state_dict(), {"config": "tiny", "seed": "3"})
    state = load_checkpoint(path)
    assert state["0.weight"].dtype == torch.float16
    assert state["1.num_batches_tracked"].dtype == torch.int64
    fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_strict(fresh, state, (), path)
    assert fresh[0].weight.dtype == torch.float32
    assert torch.equal(fresh[0].weight, network[0].weight.half().float())
    assert read_metadata(path) == {"config": "tiny", "seed": "3"}
    assert os.listdir(path.parent) == ["net.safetensors"]
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_weights_make_equal_bytes(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    for name in range(8):
        save_checkpoint(tmp_path / str(name), state, {"x": "1", "y": "2"})
    assert len({sha256(path) for path in tmp_path.iterdir()}) == 1
    assert read_metadata(tmp_path / "0") == {"x": "1", "y": "2"}
    fresh = nn.Linear(3, 2)
    load_strict(fresh, load_checkpoint(tmp_path / "0"), (), tmp_path / "0")
    assert torch.equal(fresh.weight, state["weight"].half().float())


def test_values_beyond_half_precision_are_not_written_as_infinity(tmp_path):
    state = {"wide": torch.tensor([7e4])}
    with pytest.raises(InputError, match=r"wide holds values too large for torch\.float16"):
        save_checkpoint(tmp_path / "f.safetensors", state)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "f.safetensors", state, dtype=torch.float32)
    assert equal(load_checkpoint(tmp_path / "f.safetensors"), state)


def test_tied_names_are_stored_once_and_come_back(tmp_path):
    path, network = tmp_path / "cma.safetensors", cma()
    save_checkpoint(path, network.state_dict(), {"method": "cma"}, torch.float32, TIED)
    stored = safetensors.torch.load_file(path)
    assert not any(name.startswith("bbox_embed.") for name in stored)
    assert len(network.state_dict()) - len(stored) == 2 * 3 * 2  # layers of the decoder x layers of a head x two
    fresh = cma(seed=1)
    load_network(fresh, path)
    assert equal(dict(fresh.state_dict()), dict(network.state_dict()))
    assert fresh.bbox_embed[0].layers[0].weight is fresh.transformer.decoder.bbox_embed[0].layers[0].weight


def test_tied_names_that_disagree_are_refused(tmp_path):
    state = dict(cma().state_dict())
    state["bbox_embed.0.layers.0.bias"] = state["bbox_embed.0.layers.0.bias"] + 1
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"odd.pth: bbox_embed\.0\.layers\.0\.bias and \S+ are one tensor"):
        load_checkpoint(tmp_path / "odd.pth", TIED)
    one_name = {name: item for name, item in cma().state_dict().items() if not name.startswith("transformer.decoder.b")}
    torch.save(one_name, tmp_path / "one.pth")
    assert equal(load_checkpoint(tmp_path / "one.pth", TIED), dict(cma().state_dict()))


def test_the_wrong_architecture_is_named(tmp_path):
    torch.save({"model": cma(use_dab=False).state_dict()}, tmp_path / "f.pth")
    with pytest.raises(InputError) as error:
        load_network(cma(), tmp_path / "f.pth")
    assert "file looks like CMA use_dab=False (non-DAB) backbone tiny_resnet" in str(error.value)
    assert "the network is CMA use_dab=True backbone tiny_resnet" in str(error.value)
    assert "10 missing (transformer.decoder.query_scale." in str(error.value)
    assert "3 unexpected (" in str(error.value)


@pytest.mark.parametrize("name", ["resnet101", "swin_s_p4w7", "swin_b_p4w7", "video_swin_t_p4w7"])
def test_backbones_are_told_apart_behind_their_prefix(name):
    with torch.device("meta"):
        state = {f"backbone.0.body.{key}": item for key, item in build_backbone(name).state_dict().items()}
    assert looks_like(state) == f"backbone {name}"
    assert looks_like(state | {"controller.x": None, "query_embed.weight": None}).startswith("ReferFormer")


def test_training_starts_from_referformer_without_its_classes(tmp_path):
    affinity = ("support_qkv.", "query_qkv.", "conv_q.", "layer_norm.")
    other = cma(use_dab=False).state_dict()
    state = {name: item for name, item in other.items() if not name.startswith(affinity)}
    state |= {f"class_embed.{layer}.weight": torch.ones(65, 32) for layer in range(2)}
    torch.save({"model": state}, tmp_path / "referformer.pth")
    network = cma(seed=1)
    before = {name: item.clone() for name, item in network.state_dict().items()}
    fresh = start_from(network, tmp_path / "referformer.pth")
    expected = (*affinity, "class_embed.", "tgt_embed.", "refpoint_embed.", "transformer.decoder.query_scale.")
    assert all(name.startswith((*expected, "transformer.decoder.ref_point_head.")) for name in fresh)
    assert {name.split(".")[0] for name in fresh} >= {prefix.split(".")[0] for prefix in expected}
    for name, item in network.state_dict().items():
        assert torch.equal(item, before[name] if name in fresh else state[name]), name


def test_a_classifier_is_no_starting_point(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(InputError, match="linear.pth: no starting point, since"):
        start_from(cma(), tmp_path / "linear.pth")
