"""The checkpoints that come with the project: small, complete, and trained on no category that they are asked about."""

from __future__ import annotations

import json

import pytest

from fewref.episodes.readers import read_index
from fewref.episodes.sampler import training_pools
from fewref.episodes.synthetic import CATEGORIES, FOLDERS, write_synthetic
from fewref.methods.registry import load_method
from fewref.methods.shipped import CHECKPOINTS, shipped_names
from fewref.methods.weights import read_metadata

START = "builtin-pretrain-none"
FAMILY = {"cma-self": "cma", "cma-base": "cma", "tf2": "referformer"}  # whose pretraining a method starts from


def record_of(name: str) -> dict:
    return json.loads((CHECKPOINTS / name / "training.json").read_text())


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_checkpoint_loads_and_says_how_it_was_made(name):
    path = CHECKPOINTS / name / "weights.safetensors"
    assert path.stat().st_size < 6_000_000
    about, record = read_metadata(path), record_of(name)
    method, _, meta = name.split("-builtin-")[0].partition("+")
    group = name.rsplit("-", 1)[1]
    assert (about["method"], about["group"], about["command"]) == (method, group, record["command"])
    assert f"fewref train --method {method} --dataset builtin" in record["command"]
    assert f"--group {group} --config tiny" in record["command"]
    assert (f"--meta {meta}" in record["command"]) == bool(meta)
    fresh = record if "--init" not in record["command"] else record_of(f"{FAMILY.get(method, method)}-{START}")
    assert meta or record["loss_curve"]["total"][-1] < 0.5 * fresh["loss_curve"]["total"][0]
    cls = load_method(method)
    assert cls(weights=path).parameters() > 1_000_000


def test_shipped_checkpoints_were_trained_on_other_categories(tmp_path):
    """Base categories of the group alone, and before them looks that no benchmark has."""
    write_synthetic(tmp_path / "data", layouts=("youtube",))
    index = read_index("builtin", tmp_path / "data" / FOLDERS["youtube"])
    groups = index.split().groups
    for name in shipped_names():
        record = record_of(name)
        if name.endswith(START):
            assert sorted(record["base_categories"]) == sorted(CATEGORIES["pretrain"])
            assert "--init" not in record["command"]
            continue
        group = name.rsplit("-", 1)[1]
        assert record["metadata_hash"] == index.metadata_hash()
        assert record["base_categories"] == sorted(training_pools(index, index.split(), group))
        assert not set(record["base_categories"]) & set(groups[group])
        words = record["command"].split()
        start = words[words.index("--init") + 1]
        assert start.endswith((START, f"-builtin-{group}"))
        assert start in shipped_names()
    assert not set(CATEGORIES["pretrain"]) & set(CATEGORIES["youtube"])
