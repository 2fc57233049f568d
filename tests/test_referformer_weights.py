"""ReferFormer's checkpoints: files as upstream writes them, starting points, files of other methods."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from fewref.episodes.errors import InputError
from fewref.methods.cma.adapter import CMA
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.query_net import QueryNet
from fewref.methods.query_checkpoint import TIED, load_network, start_from
from fewref.methods.referformer.adapter import ReferFormer
from fewref.methods.referformer.net import ReferFormerNet
from fewref.methods.shipped import CHECKPOINTS
from fewref.methods.text import build_text_encoder
from fewref.methods.weights import save_checkpoint

ROBERTA = {
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "type_vocab_size": 1,
}


def small(cls: type[QueryNet] = ReferFormerNet, seed: int = 0, **options: object) -> QueryNet:
    """A network of a few thousand weights, all of them random."""
    torch.manual_seed(seed)
    sizes = {"hidden": 32, "heads": 4, "ffn": 8, "encoder_layers": 1, "decoder_layers": 2} | options
    backbone = build_backbone("tiny_resnet", channels=(8, 8, 8, 8))
    network = cls(backbone=backbone, text_encoder=build_text_encoder(ROBERTA), **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def upstream_file(path: Path, network: QueryNet, legacy: bool = True, **extra: object) -> dict[str, torch.Tensor]:
    """Write what upstream's training writes; returns the network's own part of the weights.

    Beside it are the position ids of the transformers of 2022 and what a tool for counting operations leaves.
    """
    state = {name: item.clone() for name, item in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5])
    extra = {
        "text_encoder.embeddings.position_ids": torch.arange(514)[None],
        "total_ops": torch.zeros(1, dtype=torch.float64),
        "transformer.encoder.layers.0.total_params": torch.zeros(1, dtype=torch.float64),
        **extra,
    }
    options = argparse.Namespace(lr=1e-4, backbone="resnet50", binary=True, with_box_refine=True, resume="")
    content = {"model": {**state, **extra}, "optimizer": optimiser.state_dict(), "epoch": 5, "args": options}
    content["lr_scheduler"] = schedule.state_dict()
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return state


def assert_equal(network: QueryNet, state: dict[str, torch.Tensor]) -> None:
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert [name for name in own if not torch.equal(own[name], state[name])] == []


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("options", [{}, {"refined": False, "classes": 3, "coordinates": False}])
def test_an_upstream_file_loads(tmp_path, legacy, options):
    path = tmp_path / "ytvos_r50.pth"
    state = upstream_file(path, small(**options), legacy)
    network = small(seed=1, **options)
    load_network(network, path)
    assert_equal(network, state)


def test_our_own_file_comes_back(tmp_path):
    network, fresh = small(), small(seed=1)
    save_checkpoint(tmp_path / "own.safetensors", network.state_dict(), dtype=torch.float32, tied=TIED)
    load_network(fresh, tmp_path / "own.safetensors")
    assert_equal(fresh, dict(network.state_dict()))


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (small, lambda **_: small(CMANet, use_dab=False), ["unexpected (support_qkv", "looks like CMA", "is Refer"]),
        (small, lambda **_: small(CMANet), ["unexpected", "looks like CMA use_dab=True", "is ReferFormer"]),
        (lambda **_: small(CMANet, use_dab=False), small, ["missing (support_qkv", "looks like Refer", "is CMA"]),
        (lambda **_: small(refined=False), small, ["unexpected (transformer.decoder.bbox_embed", "choose weights"]),
        (small, lambda **_: small(classes=65), ["class_embed.0.weight (65, 32) for (1, 32)"]),
        (small, lambda **_: small(queries=7), ["query_embed.weight (7, 32) for (5, 32)"]),
    ],
    ids=["cma", "cma with anchors", "referformer for cma", "unrefined", "classes", "queries"],
)
def test_a_file_of_another_network_is_refused_in_one_line(tmp_path, own, other, words):
    path = tmp_path / "other.pth"
    upstream_file(path, other())
    network = own(seed=1)
    before = {name: item.clone() for name, item in network.state_dict().items()}
    with pytest.raises(InputError, match="does not fit this network") as error:
        load_network(network, path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    assert_equal(network, before)


def test_the_methods_refuse_each_others_checkpoints(tmp_path):
    cma = next(CHECKPOINTS.glob("cma-*")) / "weights.safetensors"
    with pytest.raises(InputError, match="looks like CMA .*the network is ReferFormer"):
        ReferFormer(weights=str(cma))
    path = tmp_path / "referformer.safetensors"
    save_checkpoint(path, ReferFormer(weights="untrained").network.state_dict(), tied=TIED)
    with pytest.raises(InputError, match="looks like ReferFormer .*the network is CMA"):
        CMA(weights=str(path))


@pytest.mark.parametrize("classes", [1, 65])
def test_training_starts_from_a_pretrained_file_with_new_class_heads(tmp_path, classes):
    path = tmp_path / "r50_pretrained.pth"
    state = upstream_file(path, small(classes=classes))
    network = small(seed=1)
    before = {name: item.clone() for name, item in network.state_dict().items()}
    fresh = start_from(network, path)
    assert set(fresh) == {f"class_embed.{layer}.{part}" for layer in range(2) for part in ("weight", "bias")}
    assert_equal(network, {**state, **{name: before[name] for name in fresh}})


def test_training_starts_from_our_own_file_with_its_class_heads(tmp_path):
    path, network, fresh = tmp_path / "base.safetensors", small(), small(seed=1)
    save_checkpoint(path, network.state_dict(), dtype=torch.float32, tied=TIED)
    assert start_from(fresh, path) == ()
    assert_equal(fresh, dict(network.state_dict()))


def test_another_size_is_no_starting_point(tmp_path):
    upstream_file(tmp_path / "wide.pth", small(ffn=16))
    with pytest.raises(InputError, match=r"wide.pth: does not fit this network: .* of another shape or kind"):
        start_from(small(), tmp_path / "wide.pth")
