"""The matrix of runs: which there are, where they lie, that they resume as one, what is refused before any begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fewref.benchmark import matrix
from fewref.benchmark.commands import RunOptions, report, run_folder
from fewref.benchmark.inputs import fewer_queries, find_runs, first_draws
from fewref.benchmark.matrix import Lists, adapt_changes, count_jobs, plan, run_matrix, supported
from fewref.benchmark.store import read_header, read_rows
from fewref.episodes.errors import InputError
from fewref.methods import shipped
from fewref.methods.adaptation.options import STRATEGIES
from fewref.methods.controls import Empty
from fewref.methods.registry import METHODS, load_method
from fewref.run_benchmark import main

DATASET, TOY = "mini-ref-youtube-vos", "toy_trainable:Toy"
CONTROLS = [name for name in METHODS if load_method(name).info.kind == "control"]


@pytest.fixture
def base(small, tmp_path) -> RunOptions:
    data = {"dataset": DATASET, "data_root": small.root, "group": "1", "manifest": small.path}
    return RunOptions("", **data, workers=0, out=tmp_path / "out", progress=False)


def command(small, out, *more: str) -> list[str]:
    data = ["--dataset", DATASET, "--data-root", str(small.root), "--groups", "1", "--out", str(out)]
    return ["run", *data, "--jobs", "1", "--workers", "0", *more]


def labels(plans) -> list[str]:
    return [run_folder(one, one.group).parent.name for one in plans]


def test_combinations_and_their_folders(base):
    lists = Lists((TOY, "copy-support"), ("none", "finetune", "prototype"), steps=(2, 3))
    plans, left_out = plan(lists, base)
    toy = TOY.replace(":", ".")
    names = [toy, f"{toy}+finetune-steps2", f"{toy}+finetune-steps3", f"{toy}+prototype", "copy-support"]
    assert labels(plans) == names
    assert left_out == []
    assert [one.adapt_changes for one in plans] == [{}, {"steps": 2}, {"steps": 3}, {}, {}]
    alone, _ = plan(Lists((TOY,), ("finetune",), steps=(2,)), base)
    assert labels(alone) == [f"{toy}+finetune"]
    several = dataclasses.replace(base, dataset="builtin", data_root=None, manifest=None, group="2,4", out=None)
    assert [one.group for one in plan(Lists(("empty", "random")), several)[0]] == ["2", "4", "2", "4"]


def test_changes_reach_the_strategies_that_have_a_use_for_them(base):
    changed = dataclasses.replace(base, adapt_changes={"lr": 0.5, "temperature": 3.0})
    plans, _ = plan(Lists((TOY,), ("none", "head", "prototype")), changed)
    assert [one.adapt_changes for one in plans] == [{}, {"lr": 0.5, "temperature": 3.0}, {"temperature": 3.0}]


def test_shots_have_folders_of_their_own(base):
    free = dataclasses.replace(base, manifest=None, changes={"supports": 1})
    plans, _ = plan(Lists(("empty",), shots=(1, 2)), free)
    assert [one.changes["shots"] for one in plans] == [1, 2]
    assert [run_folder(one, "1").relative_to(base.out).as_posix() for one in plans] == [
        "empty/group-1",
        "shots2/empty/group-1",
    ]
    anywhere = RunOptions("empty", dataset=DATASET)
    assert run_folder(anywhere, "1") == Path(f"runs/{DATASET}-group/empty/group-1")
    for shots, folder in ((1, f"{DATASET}-group"), (5, f"{DATASET}-group-shots5")):
        told = dataclasses.replace(anywhere, changes={"shots": shots})
        assert run_folder(told, "1") == Path("runs") / folder / "empty/group-1"


def test_a_matrix_resumes_as_one(small, tmp_path, capsys):
    wanted = ["--methods", f"{TOY},copy-support", "--adapt", "none,finetune", "--shots", "1,2", "--supports", "1"]
    wanted += ["--adapt-steps", "1", "--adapt-lr", "0.5", "--adapt-option", "augment=false", "--queries", "2"]
    assert main(command(small, tmp_path, *wanted)) == 0
    folders = find_runs([tmp_path])
    assert len(folders) == 2 * 3
    header = read_header(tmp_path / "toy_trainable.Toy+finetune/group-1")["defines"]["adaptation"]
    assert (header["steps"], header["lr"], header["augment"]) == (1, 0.5, False)
    assert read_header(tmp_path / "shots2/copy-support/group-1")["defines"]["episodes"]["shots"] == 2
    before = {path: path.read_bytes() for folder in folders for path in folder.glob("*.jsonl")}
    assert len(before) == 12
    torn = tmp_path / "toy_trainable.Toy+finetune/group-1/rows.jsonl"
    torn.write_bytes(before[torn][: len(before[torn]) // 2])
    capsys.readouterr()
    assert main(command(small, tmp_path, *wanted)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    again = [row.query for row in read_rows(torn.parent)]
    assert len(again) == len(before.pop(torn).splitlines())
    for path, content in before.items():
        assert path.read_bytes() == content or "Toy+finetune/group-1" in path.as_posix()
    assert main(["table", str(tmp_path), "--curve", "shots", "--out", str(tmp_path / "curve")]) == 0
    assert (tmp_path / "curve/curve-shots.png").stat().st_size > 1000


def test_a_single_run_is_what_it_was(small, tmp_path, capsys):
    """No matrix: the same folder, and rows of all queries."""
    arguments = command(small, tmp_path, "--method", "copy-support", "--manifest", str(small.path))
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy-support/group-1'}: 24 queries\n"


def test_failed_queries_end_a_matrix_with_their_count(base, monkeypatch, capsys):
    def fail(self, query):
        raise ValueError("no")

    monkeypatch.setattr(Empty, "predict", fail)
    results = run_matrix(Lists(("empty", "random")), base, jobs=1)
    assert report(results) == 3
    assert [result.failed for result in results] == [24, 0]
    assert "24 failed" in capsys.readouterr().out


def test_all_leaves_out_what_is_impossible(base):
    with pytest.raises(InputError, match="no checkpoint of cma is shipped for mini-ref-youtube-vos, group 1"):
        plan(Lists(("all",), ("none", "finetune")), base)
    plans, left_out = plan(Lists(("all",), ("none",)), base)
    assert labels(plans) == CONTROLS
    networks = [name for name in METHODS if name not in CONTROLS]
    assert [line.split(":")[0] for line in left_out] == networks
    assert all("no checkpoint" in line for line in left_out)
    untrained, nothing = plan(Lists(("all",), ("none", "head")), dataclasses.replace(base, weights="untrained"))
    assert nothing == []
    assert len(untrained) == len(CONTROLS) + 2 * len(networks)


def test_what_is_asked_for_by_name_is_refused_before_anything_starts(base, monkeypatch):
    two = ("empty", "random")
    refused = [
        (Lists(("empty",), ("finetune",)), {}, "--adapt finetune: method empty has no training loss"),
        (Lists(("empty", "cma")), {}, "no checkpoint of cma is shipped"),
        (Lists(("empty", "nothing")), {}, "method 'nothing' is unknown"),
        (Lists(two, ("finetun",)), {}, "--adapt 'finetun' is unknown: did you mean 'finetune'"),
        (Lists(("empty", "empty")), {}, "--methods: empty, empty names something twice"),
        (Lists(("empty", "all")), {}, "'all' stands alone"),
        (Lists(two, steps=(5,)), {}, "--adapt-steps: --adapt none takes no steps"),
        (Lists((TOY,), ("prototype",)), {"adapt_changes": {"lr": 0.1}}, "--adapt-lr: --adapt prototype takes no steps"),
        (Lists(two), {"adapt_changes": {"augment": False}}, "--adapt-option augment: nothing is adapted"),
        (Lists((TOY,), ("head",), steps=(1,)), {"adapt_changes": {"steps": 2}}, "given by --adapt-steps, too"),
        (Lists(("all",)), {"weights": "file.pth"}, "--weights file.pth: a checkpoint is of one method"),
        (Lists(two, shots=(1, 2)), {}, "--manifest .*: its episodes are fixed; leave shots away"),
        (Lists(two, shots=(1, 99)), {"manifest": None}, "99"),
        (Lists(two), {"queries": 0}, "--queries 0"),
        (Lists(two), {"window": 0}, "--window 0"),
        (Lists(two), {"group": "7"}, "--group '7'"),
        (Lists(two), {"protocol": "gruop"}, "did you mean 'group'"),
    ]
    for lists, changes, message in refused:
        with pytest.raises(InputError, match=message) as caught:
            run_matrix(lists, dataclasses.replace(base, **changes), jobs=1)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--jobs 0"):
        run_matrix(Lists(two), base, jobs=0)
    monkeypatch.setattr(matrix.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--adapt maml: learn2learn is not installed; `make setup-meta` installs it"):
        run_matrix(Lists((TOY,), ("none", "maml")), base, jobs=1)
    assert not base.out.exists()


def test_controls_come_once_beside_others(base):
    plans, _ = plan(Lists(("empty", TOY), ("finetune", "head")), base)
    assert labels(plans)[0] == "empty"
    assert len(plans) == 3
    assert supported(Empty) == ("none",)
    assert supported(load_method(TOY)) == STRATEGIES


@pytest.mark.parametrize("text", ["lr", "lr=", "lr=fast", "=1", "augment=yes", "lr=0.1"])
def test_bad_adapt_options(text):
    with pytest.raises(InputError, match="option"):
        adapt_changes(0.5, [text])


def test_adapt_options_are_json():
    changes = adapt_changes(None, ["augment=false", 'frozen=["text"]', "steps=3", "lr=1"])
    assert changes == {"augment": False, "frozen": ["text"], "steps": 3, "lr": 1}
    with pytest.raises(InputError, match="'stesp' is unknown: did you mean 'steps'"):
        adapt_changes(None, ["stesp=3"])


def test_one_process_where_processes_would_be_in_the_way(monkeypatch):
    assert count_jobs(3, "cuda") == 3
    assert count_jobs(None, "cuda") == 1
    assert count_jobs(None, "cpu") >= 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_jobs(8, "cpu") == 1


def test_meta_learned_checkpoints_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "CHECKPOINTS", tmp_path)
    for name in ("cma-builtin-1", "cma+maml-builtin-1", "cma-builtin-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").touch()

    def found(group: str, strategy: str) -> str:
        return Path(shipped.find_weights("cma", None, "tiny", "builtin", group, strategy)).parent.name

    assert found("1", "maml") == "cma+maml-builtin-1"
    assert [found("1", strategy) for strategy in ("none", "finetune", "anil")] == ["cma-builtin-1"] * 3
    assert found("2", "maml") == "cma-builtin-2"
    with pytest.raises(InputError, match="no checkpoint of cma"):
        found("3", "maml")
    monkeypatch.setattr(matrix.importlib.util, "find_spec", lambda name: name)  # as if learn2learn were installed
    message = "--adapt meta-sgd: .*cma-builtin-1.* has no learning rates; `train --meta meta-sgd` writes them"
    with pytest.raises(InputError, match=message):
        matrix.check_possible("cma", "meta-sgd", RunOptions("cma"), ["1"])


def test_fewer_queries_are_evenly_spaced_and_the_same_in_every_draw(small):
    few = fewer_queries(small.manifest, 2)
    assert [len(episode.queries) for episode in few.episodes] == [2] * len(small.manifest.episodes)
    for episode, whole in zip(few.episodes, small.manifest.episodes, strict=True):
        assert episode.queries == (whole.queries[0], whole.queries[2])
        assert [target.query for target in episode.targets] == [query.id for query in episode.queries]
        assert episode.support == whole.support
    assert few.notes == (
        *small.manifest.notes,
        "at most 2 queries of each episode are asked, evenly spaced, of up to 4",
    )
    assert few.hash != small.manifest.hash
    assert fewer_queries(small.manifest, None) is small.manifest
    assert fewer_queries(small.manifest, 4) is small.manifest
    assert {episode.seed for episode in fewer_queries(first_draws(small.manifest, 1), 1).episodes} == {0}


def test_table_says_that_fewer_queries_were_asked(small, tmp_path):
    arguments = command(small, tmp_path, "--method", "empty", "--manifest", str(small.path), "--queries", "1")
    assert main(arguments) == 0
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "tables")]) == 0
    assert "at most 1 queries of each episode are asked" in (tmp_path / "tables/leaderboard.md").read_text()
