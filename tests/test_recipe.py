"""Optimiser groups, schedules and options of a training."""

from __future__ import annotations

import pytest
import torch
from golden_case import golden_folder

from fewref.benchmark.inputs import named_values
from fewref.benchmark.recipe import TrainOptions, build_optimiser, group_of, parameter_groups, rate, read_options
from fewref.benchmark.training_record import option_words
from fewref.episodes.errors import InputError, read_json
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.text import build_text_encoder


def test_optimiser_groups_of_upstream() -> None:
    golden = read_json(golden_folder("cma") / "optimizer_groups.json")
    names = {"lr_1e-4": "main", "lr_backbone_5e-5": "backbone", "lr_text_1e-5": "text", "lr_linear_proj_1e-4": "linear"}
    for key, group in names.items():
        assert [name for name in golden[key] if group_of(name, "upstream") != group] == []
        assert [name for name in golden[key] if group_of(name) != group] == []
    for name in golden["trainable_but_in_no_group"]:
        assert group_of(name, "upstream") == ""
        assert group_of(name) == "affinity"


def test_optimiser_groups_of_the_whole_network() -> None:
    golden = read_json(golden_folder("cma") / "optimizer_groups.json")
    with torch.device("meta"):
        text = build_text_encoder({"vocab_size": 10, "num_hidden_layers": 1})
        network = CMANet(backbone=build_backbone("resnet50"), text_encoder=text)
    names = {id(p): name for name, p in network.named_parameters()}
    upstream = parameter_groups(network.named_parameters(), TrainOptions(faithful="upstream"))
    found = {group["name"]: [names[id(p)] for p in group["params"]] for group in upstream}
    assert found == {"main": golden["lr_1e-4"], "linear": golden["lr_linear_proj_1e-4"]}
    assert [group["lr"] for group in upstream] == [1e-4, 1e-4]
    fixed = parameter_groups(network.named_parameters(), TrainOptions())
    affinity = next(group for group in fixed if group["name"] == "affinity")
    assert [names[id(p)] for p in affinity["params"]] == golden["trainable_but_in_no_group"]
    assert affinity["lr"] == 1e-4
    assert build_optimiser(network, TrainOptions()).defaults["weight_decay"] == 5e-4


def test_schedules() -> None:
    paper = TrainOptions()
    epoch = 36 * 100
    factors = [rate(step, paper, 36) for step in (0, 3 * epoch - 1, 3 * epoch, 5 * epoch - 1, 5 * epoch)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = TrainOptions(schedule="cosine", steps=110, warmup=10)
    assert [rate(step, cosine, 36) for step in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.5, 0])


def test_bad_options() -> None:
    with pytest.raises(InputError, match="did you mean 'batch'"):
        read_options({"bach": 2})
    with pytest.raises(InputError, match="schedule: 'cosin' is unknown; did you mean 'cosine'"):
        read_options({"schedule": "cosin"})
    with pytest.raises(InputError, match="batch: 0 is too small"):
        read_options({"batch": 0})
    with pytest.raises(InputError, match="precision: 'bf61' is unknown; did you mean 'bf16'"):
        read_options({"precision": "bf61"})
    with pytest.raises(InputError, match="checkpointing: 'yes' is no switch; give true or false"):
        read_options({"checkpointing": "yes"})
    with pytest.raises(InputError, match="lr: 'fast' is no number"):
        read_options({"lr": "fast"})
    with pytest.raises(InputError, match="batch: True is no whole number"):
        read_options({"batch": True})
    assert read_options({"lr": 1, "size": [32, 48], "drop_steps": [5]}) == TrainOptions(
        lr=1.0, size=(32, 48), drop_steps=(5,)
    )
    assert read_options({"size": None}) == TrainOptions()


def test_options_on_the_command_line() -> None:
    texts = ["precision=bf16", "checkpointing=true", "lr=1e-3", "size=[64,96]"]
    values = named_values("--option", texts)
    assert values == {"precision": "bf16", "checkpointing": True, "lr": 1e-3, "size": [64, 96]}
    assert option_words(values)[1::2] == ["precision=bf16", "checkpointing=true", "lr=0.001", "size=[64,96]"]
    assert read_options(values).checkpointing
    with pytest.raises(InputError, match="--option lr=1e: give NAME=VALUE with the value in JSON or a word"):
        named_values("--option", ["lr=1e"])


def test_loss_weights_are_checked() -> None:
    assert read_options({"loss_weights": {"ce": 20}}).loss_weights == {"ce": 20}
    with pytest.raises(InputError, match="loss_weights: 'dise' is unknown; did you mean 'dice'"):
        TrainOptions(loss_weights={"dise": 1})
