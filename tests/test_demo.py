"""The demo's parts: runs planned over several processes equal runs made here, and errors come through."""

import pytest

from fewref.benchmark import demo
from fewref.benchmark.commands import RunOptions, run_folder, run_groups
from fewref.benchmark.demo import ABLATIONS, ASKED, leaderboard_rows, meta_rows, possible
from fewref.benchmark.matrix import run_all
from fewref.benchmark.store import COSTS, read_rows
from fewref.episodes.errors import InputError
from fewref.methods import shipped
from fewref.methods.registry import METHODS, load_method


def plans(small, out, **options):
    common = {"dataset": "mini-ref-youtube-vos", "data_root": small.root, "group": "1", "workers": 0, "progress": False}
    methods = ("empty", "copy-support")
    return [RunOptions(method=name, **common, manifest=small.path, out=out, **options) for name in methods]


def test_several_processes_give_the_same_rows(small, tmp_path):
    results = run_all(plans(small, tmp_path / "pool"), 2, "test")
    assert [result.failed for result in results] == [0, 0]
    assert [result.folder.parent.name for result in results] == ["empty", "copy-support"]
    for here, there in zip(plans(small, tmp_path / "here"), plans(small, tmp_path / "pool"), strict=True):
        run_groups(here)
        alone, pooled = (
            [{k: v for k, v in vars(row).items() if k not in COSTS} for row in read_rows(run_folder(plan, "1"))]
            for plan in (here, there)
        )
        assert alone == pooled


def test_bad_input_of_one_run_ends_all(small, tmp_path):
    with pytest.raises(InputError, match="--window 0"):
        run_all(plans(small, tmp_path / "out", window=0), 2, "test")


def test_what_is_asked_has_every_control_and_both_ablations():
    controls = {name for name in METHODS if load_method(name).info.kind == "control"}
    assert {asked["method"] for asked in ASKED} == controls | {"cma"}
    assert {asked.get("text") for asked in ASKED + ABLATIONS} == {None, "empty", "other"}
    assert {asked.get("support") for asked in ASKED + ABLATIONS} == {None, "other-category", "none"}


def test_the_leaderboard_has_every_method_with_and_without_fine_tuning(capsys, monkeypatch):
    rows = leaderboard_rows()
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    asked = {(row["method"], row.get("adapt", "none")) for row in rows}
    networks = {name for name in METHODS if load_method(name).info.kind == "method"}
    assert asked >= {(name, strategy) for name in networks for strategy in ("none", "finetune")}
    assert ("cma", "prototype") in asked
    assert {row["method"] for row in rows} == set(METHODS)
    monkeypatch.setattr(shipped, "shipped_names", lambda: ("cma-builtin-1", "cma-builtin-2"))
    kept = possible(rows, ("1", "2"))
    assert {row["method"] for row in kept} == (set(METHODS) - networks) | {"cma"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(rows) - len(kept)
    assert any(line.startswith("left out: referformer + finetune: no checkpoint") for line in lines)
    assert not [row for row in possible(rows, ("1", "2", "3")) if row["method"] in networks]


def test_meta_learned_rows_need_a_checkpoint_of_every_group(monkeypatch):
    monkeypatch.setattr(demo, "shipped_names", lambda: ("cma-builtin-1", "cma+maml-builtin-1", "cma+anil-builtin-2"))
    assert meta_rows(("1",)) == [{"method": "cma", "adapt": "maml"}]
    assert meta_rows(("1", "2")) == []
