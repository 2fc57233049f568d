"""The demo's parts: runs planned over several processes equal runs made here, and errors come through."""

import pytest

from fewref.benchmark.commands import RunOptions, run_folder, run_groups
from fewref.benchmark.demo import ABLATIONS, ASKED, run_all
from fewref.benchmark.store import COSTS, read_rows
from fewref.episodes.errors import InputError
from fewref.methods.registry import METHODS


def plans(small, out, **options):
    common = {"dataset": "mini-ref-youtube-vos", "data_root": small.root, "group": "1", "workers": 0, "progress": False}
    methods = ("empty", "copy-support")
    return [RunOptions(method=name, **common, manifest=small.path, out=out, **options) for name in methods]


def test_several_processes_give_the_same_rows(small, tmp_path):
    assert run_all(plans(small, tmp_path / "pool")) == 0
    for here, there in zip(plans(small, tmp_path / "here"), plans(small, tmp_path / "pool"), strict=True):
        run_groups(here)
        alone, pooled = (
            [{k: v for k, v in vars(row).items() if k not in COSTS} for row in read_rows(run_folder(plan, "1"))]
            for plan in (here, there)
        )
        assert alone == pooled


def test_bad_input_of_one_run_ends_all(small, tmp_path):
    with pytest.raises(InputError, match="--window 0"):
        run_all(plans(small, tmp_path / "out", window=0))


def test_what_is_asked_has_every_control_and_both_ablations():
    assert {asked["method"] for asked in ASKED} == set(METHODS) - {"cma-self", "cma-base"}
    assert {asked.get("text") for asked in ASKED + ABLATIONS} == {None, "empty", "other"}
    assert {asked.get("support") for asked in ASKED + ABLATIONS} == {None, "other-category", "none"}
