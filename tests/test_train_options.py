"""Options of a training that change its speed and memory: checkpointing, bf16 and the fused optimiser."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import RECIPE, VOCABULARY, small_network, source, tokenize
from torch import Tensor, nn

from fewref.benchmark.meta_train import meta_train
from fewref.benchmark.recipe import TrainOptions, build_optimiser, load_optimiser
from fewref.benchmark.train import train
from fewref.benchmark.train_data import batches
from fewref.episodes.errors import InputError
from fewref.episodes.readers import DatasetIndex, read_index
from fewref.episodes.sampler import training_pools
from fewref.episodes.synthetic import write_synthetic
from fewref.methods.batch import Batch
from fewref.methods.checkpointing import checkpointed
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.losses import criterion
from fewref.methods.layers.matcher import LossWeights
from fewref.methods.query_checkpoint import TIED
from fewref.methods.referformer.net import ReferFormerNet
from fewref.methods.text import build_text_encoder
from fewref.methods.tf2.net import TF2Net
from fewref.run_benchmark import main
from fewref.splits import load_split


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, videos_per_category=2, layouts=("youtube",), workers=1)
    return read_index("builtin", root)


@pytest.fixture(scope="module")
def pools(index: DatasetIndex) -> dict:
    return training_pools(index, load_split("builtin"), "1")


def single(cls: type, backbone: str = "tiny_resnet", **options: object) -> nn.Module:
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 1,
    }
    sizes = {"hidden": 32, "heads": 4, "ffn": 64, "encoder_layers": 2, "decoder_layers": 1, "freeze_text": False}
    return cls(backbone=build_backbone(backbone), text_encoder=build_text_encoder(text), **sizes, **options)


def gradients(network: nn.Module, batch: Batch, inside=nullcontext) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that the graph holds when the forward pass is over."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    network.train().zero_grad()
    torch.manual_seed(1)
    with inside():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network.episode(batch)
        total, _ = criterion(outputs, batch.targets, LossWeights(), LossWeights(), network.classify_valid)
        total.backward()
    held = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return total.detach(), found, held


NETWORKS = {
    "cma": small_network,
    "referformer": lambda: single(ReferFormerNet, freeze_backbone=False),
    "tf2": lambda: single(TF2Net),
    "frozen resnet50": lambda: single(ReferFormerNet, "resnet50", freeze_backbone=True),
    "video swin": lambda: single(ReferFormerNet, "video_swin_t_p4w7", freeze_backbone=False),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(index: DatasetIndex, pools: dict, name: str, precision: str) -> None:
    """Dropout and drop path are on: what is computed again must draw the same."""
    network = NETWORKS[name]()
    names = list(network.state_dict())
    support = 2 if name == "cma" else 0
    drawn = source(index, pools, support_frames=support, tracking=float(name == "tf2"), batch=1)
    _, batch = next(batches(drawn, tokenize, 0, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, plain, held = gradients(network, batch)
        again, found, less = gradients(network, batch, lambda: checkpointed(network))
    assert torch.equal(loss, again)
    assert plain.keys() == found.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6, msg=key)
    assert list(network.state_dict()) == names
    assert not [key for key, module in network.named_modules() if "forward" in vars(module)]
    assert less < (0.9 if name == "frozen resnet50" else 0.75) * held


def common(index: DatasetIndex, pools: dict, **changes: object) -> dict:
    config = {**RECIPE, "batch": 1, **changes}
    return {"tokenizer": tokenize, "index": index, "pools": pools, "config": config, "tied": TIED}


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "losses.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_checkpointing_can_be_switched_between_the_parts_of_a_training(
    index: DatasetIndex, pools: dict, tmp_path: Path
) -> None:
    train(network=small_network(), out=tmp_path / "whole", steps=4, **common(index, pools))
    train(network=small_network(), out=tmp_path / "parts", steps=2, **common(index, pools))
    train(network=small_network(), out=tmp_path / "parts", steps=4, **common(index, pools, checkpointing=True))
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert [row["step"] for row in table(tmp_path / "parts")] == list("1234")


def test_bf16_learns_and_keeps_full_weights(index: DatasetIndex, pools: dict, tmp_path: Path) -> None:
    few = {category: pools[category] for category in sorted(pools)[:2]}
    settings = common(index, few, precision="bf16", checkpointing=True, batch=2)
    network = small_network()
    train(network=network, out=tmp_path / "half", steps=30, **settings)
    rows = table(tmp_path / "half")
    for term in ("loss_ce", "loss_dice"):
        values = [float(row[term]) for row in rows]
        assert np.mean(values[-8:]) < 0.7 * np.mean(values[:4]), term
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    saved = torch.load(tmp_path / "half" / "last.pt", weights_only=True)
    moments = [value for state in saved["optimiser"]["state"].values() for value in state.values()]
    assert {value.dtype for value in moments} == {torch.float32}
    train(network=small_network(), out=tmp_path / "full", steps=1, **common(index, few, batch=2))
    half, full = (float(rows[0]["total"]) for rows in (rows, table(tmp_path / "full")))
    assert half != full, "nothing was computed in bf16"
    assert half == pytest.approx(full, rel=0.05)


def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a PyTorch that has no fused form for the device."""
    real = torch.optim.AdamW

    def refuse(*args: object, fused: bool | None = None, **kwargs: object) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on a supported device")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", refuse)


@pytest.mark.parametrize("later_fused", [True, False])
def test_a_checkpoint_is_continued_with_the_other_form(later_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(fused: bool) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        with monkeypatch.context() as patch:
            if not fused:
                without_fused(patch)
            optimiser = build_optimiser(layer, TrainOptions(lr=1e-2))
        assert bool(optimiser.param_groups[0]["fused"]) == fused
        return layer, optimiser

    def steps(layer: nn.Module, optimiser: torch.optim.AdamW, count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            layer(torch.linspace(-1, 1, 10).view(2, 5)).square().sum().backward()
            optimiser.step()

    whole, optimiser = made(not later_fused)
    steps(whole, optimiser, 3)
    weights, state = {k: v.clone() for k, v in whole.state_dict().items()}, optimiser.state_dict()
    later, other = made(later_fused)
    later.load_state_dict(weights)
    load_optimiser(other, read_back(state))
    assert bool(other.param_groups[0]["fused"]) == later_fused
    steps(whole, optimiser, 4)
    steps(later, other, 4)
    torch.testing.assert_close(later.weight, whole.weight, rtol=1e-5, atol=1e-6)
    assert float(other.state[later.weight]["step"]) == 7


def read_back(state: dict) -> dict:
    """As it comes back from a file."""
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_switches_on_the_command_line(index: DatasetIndex, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = next(parent for parent in [index.root, *index.root.parents] if parent.name == "set")
    words = ["train", "--data-root", str(root), "--device", "cpu", "--steps", "1", "--out", str(tmp_path)]
    options = ["batch=1", "size=[64,96]", "precision=bf16", "checkpointing=true"]
    assert main([*words, *(word for option in options for word in ("--option", option))]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["options"]["precision"], record["options"]["checkpointing"]) == ("bf16", True)
    assert "--option precision=bf16 --option checkpointing=true" in record["command"]
    assert main([*words, "--option", "precision=bf61"]) == 2
    assert "training option precision: 'bf61' is unknown; did you mean 'bf16'" in capsys.readouterr().err


def test_meta_training_refuses_checkpointing(index: DatasetIndex, tmp_path: Path) -> None:
    pytest.importorskip("learn2learn")
    with pytest.raises(InputError, match="--meta maml: cannot be trained with checkpointing"):
        meta_train(
            method="cma",
            dataset="builtin",
            data_root=index.root,
            group="1",
            config="tiny",
            out=tmp_path,
            meta="maml",
            device="cpu",
            changes={"checkpointing": True},
        )
