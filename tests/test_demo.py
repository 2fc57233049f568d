"""The demo's parts: runs planned over several processes equal runs made here, and errors come through."""

from pathlib import Path

import pytest

from fewref.benchmark import demo
from fewref.benchmark.commands import RunOptions, run_folder, run_groups
from fewref.benchmark.demo import ABLATIONS, ASKED, leaderboard_rows, meta_rows, possible
from fewref.benchmark.matrix import run_all
from fewref.benchmark.store import COSTS, read_rows
from fewref.episodes.errors import InputError, read_json
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
    known = ("referformer-builtin-1", "referformer+maml-builtin-1", "referformer+anil-builtin-2")
    monkeypatch.setattr(demo, "shipped_names", lambda: known)
    assert meta_rows(("1",)) == [{"method": "referformer"}, {"method": "referformer", "adapt": "maml"}]
    assert meta_rows(("1", "2")) == []


def test_retraining_repeats_how_the_shipped_checkpoints_were_made(tmp_path, monkeypatch):
    """Every shipped record names the same start and the same changes as the chain that makes it again."""
    made = {}

    def trained(*, out, init=None, changes=None, meta="", steps=None, **_):
        made[out.name] = (init.name if init else None, changes, meta, steps)
        return out

    monkeypatch.setattr(demo, "train_group", trained)
    monkeypatch.setattr(demo, "meta_train", trained)
    rows = [*({"method": name} for name in METHODS), {"method": "referformer", "adapt": "maml"}, {"method": "cma"}]
    monkeypatch.setitem(METHODS, "tf2-released", METHODS["empty"])  # has no checkpoint of its own
    found = demo.retrained(tmp_path, ("1", "2", "3", "4"), rows)
    assert {Path(path).name for path in found.values()} | set(shipped.shipped_names()) == set(made)
    for name in shipped.shipped_names():
        record = read_json(shipped.CHECKPOINTS / name / "training.json")
        start, changes, meta, steps = made[name]
        words = record["command"].split()
        assert (words[words.index("--init") + 1] if "--init" in words else None) == start, name
        assert [word for word in words if "=" in word] == [f"{k}={v}" for k, v in (changes or {}).items()], name
        assert (words[words.index("--meta") + 1] if "--meta" in words else "") == meta, name
        assert (int(words[words.index("--steps") + 1]) if "--steps" in words else None) == steps, name
