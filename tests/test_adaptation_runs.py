"""Adapted methods in runs: rows, header, costs, failures, and tables of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from types import SimpleNamespace

import pytest
from noisy_runs import QUERIES, content, start
from toy_trainable import Toy, state

from fewref.benchmark.results import load
from fewref.benchmark.store import COSTS, read_header, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.types import canonical_json
from fewref.methods.adaptation.adapted import wrap
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.controls import Empty

HEAD = 9  # weights of the toy's head


def options(strategy: str = "head", **changes) -> AdaptOptions:
    return AdaptOptions(strategy, **{"steps": 3, "lr": 0.01, **changes})


def begin(small, out, method=None, strategy="head", **changes):
    return start(small, out, wrap(method or Toy(), options(strategy, **changes)), method_name="toy")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    return begin(small, folder), folder


def test_rows_and_header_record_the_adaptation(whole):
    result, folder = whole
    assert result.exit_code == 0
    assert {(row.adapt_steps, row.adapt_trained, row.method) for row in result.rows} == {(3, HEAD, "toy")}
    assert all(row.seconds_adapt > 0 and row.peak_bytes > 1 << 20 for row in result.rows)
    written = read_header(folder)
    assert written["defines"]["adaptation"] == {
        **dataclasses.asdict(options()),
        "frozen": ["backbone", "text"],
    }
    assert written["defines"]["class"] == "toy_trainable:Toy"
    assert written["adapted_weights"] == ["controller.weight", "controller.bias"]


@pytest.mark.parametrize("strategy", ["finetune", "self-train", "prototype"])
def test_two_runs_give_the_same_rows(small, tmp_path, strategy):
    for name in ("one", "two"):
        method = Toy()
        before = state(method)
        begin(small, tmp_path / name, method, strategy)
        assert state(method) == before
    for kind in ("rows", "predictions"):
        assert content(tmp_path / "one", kind) == content(tmp_path / "two", kind)
    expected = {"finetune": {3}, "self-train": {2, 3}, "prototype": {0}}[strategy]
    assert {row.adapt_steps for row in read_rows(tmp_path / "one")} <= expected


def test_the_order_of_episodes_does_not_matter(small, whole, tmp_path):
    turned = dataclasses.replace(small.manifest, episodes=small.manifest.episodes[::-1])
    begin(SimpleNamespace(index=small.index, manifest=turned), tmp_path / "run")
    first, second = (sorted(content(folder, without=("run", *COSTS))) for folder in (tmp_path / "run", whole[1]))
    assert first == second


def test_a_self_training_query_pays_for_its_own_adaptation(small, tmp_path):
    rows = begin(small, tmp_path / "run", None, "self-train").rows
    assert all(row.seconds_adapt > 0 and row.seconds_predict > 0 for row in rows)
    first = [row for row in rows if row.episode == rows[0].episode]
    assert len({row.seconds_adapt for row in first}) == len(first) > 1


class Watching(Toy):
    """Notes its state whenever an episode is over."""

    def __init__(self, **chosen):
        super().__init__(**chosen)
        self.ends = []

    def forget(self):
        super().forget()
        self.ends.append(state(self))


class Diverging(Watching):
    """Its loss is no number for raccoons, at the second step."""

    def loss(self, target, memory):
        wrong = target.expression.category == "raccoon" and self.calls == 1
        return super().loss(target, memory) * (math.nan if wrong else 1)


def test_an_episode_that_cannot_be_adapted_to_fails_alone(small, whole, tmp_path):
    method = Diverging()
    before = state(method)
    result = begin(small, tmp_path / "run", method)
    assert (result.failed, result.exit_code) == (QUERIES / 3, 3)
    for row, other in zip(result.rows, whole[0].rows, strict=True):
        if row.category == "raccoon":
            assert row.status == "failed"
            assert row.error.startswith("adapt: AdaptationError: step 2: the loss is nan; lower the learning rate")
            assert (row.adapt_steps, row.scores) == (0, {})
        else:
            assert row.scores == other.scores
    assert all(seen == before for seen in method.ends)
    assert state(method) == before


def test_the_weights_come_back_after_every_episode(small, tmp_path):
    class Failing(Watching):
        def predict(self, query):
            if query.id.endswith(":1"):
                raise ValueError("no")
            return super().predict(query)

    method = Failing()
    before = state(method)
    assert begin(small, tmp_path / "run", method).failed == QUERIES / 2
    episodes = len(small.manifest.episodes)
    assert len(method.ends) == 2 * episodes + 1  # before each, after each, and at the end of the run
    assert all(seen == before for seen in method.ends)


def test_an_interrupted_run_leaves_the_method_as_it_was_and_goes_on(small, whole, tmp_path):
    class Interrupted(Watching):
        asked = 0

        def predict(self, query):
            self.asked += 1
            if self.asked == 6:
                raise KeyboardInterrupt
            return super().predict(query)

    Interrupted.__qualname__, Interrupted.__module__ = Toy.__qualname__, Toy.__module__
    method = Interrupted()
    before = state(method)
    with pytest.raises(KeyboardInterrupt):
        begin(small, tmp_path / "run", method)
    assert state(method) == before
    begin(small, tmp_path / "run")
    assert content(tmp_path / "run") == content(whole[1])


def test_other_options_are_another_run(small, whole):
    with pytest.raises(InputError, match=r"holds a run with adaptation\.lr = 0\.01, not 0\.1"):
        begin(small, whole[1], lr=0.1)
    with pytest.raises(InputError, match=r"holds a run with adaptation"):
        start(small, whole[1], Toy(), method_name="toy")


def test_entries_are_named_by_their_adaptation(small, whole, tmp_path):
    start(small, tmp_path / "none", Toy(), method_name="toy")
    begin(small, tmp_path / "more", steps=5)
    begin(small, tmp_path / "self", None, "self-train")
    frame = load([whole[1], *(tmp_path / name for name in ("none", "more", "self"))])
    seen = frame.drop_duplicates("entry").set_index("entry")
    assert set(seen.index) == {"toy", "toy + head, steps 3", "toy + head, steps 5", "toy + self-train"}
    assert seen["adaptation"].to_dict() == {
        "toy": "none",
        "toy + head, steps 3": "head",
        "toy + head, steps 5": "head",
        "toy + self-train": "self-train",
    }
    assert seen.index[seen["transductive"]].tolist() == ["toy + self-train"]
    assert seen["adapt_steps"]["toy + head, steps 5"] == 5
    assert (seen["adapt_steps"]["toy"], seen["adapt_trained"]["toy"]) == (0, 0)
    assert seen["set_frozen"]["toy + self-train"] == '["backbone","text"]'


def test_a_folder_from_before_there_were_strategies(small, tmp_path):
    folder = tmp_path / "run"
    rows = start(small, folder, Empty()).rows
    head = json.loads((folder / "header.json").read_text())
    assert head["defines"].pop("adaptation") is None
    (folder / "header.json").write_text(json.dumps(head))
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    old = [{name: value for name, value in line.items() if not name.startswith("adapt_")} for line in lines]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old[:-3]))
    assert len(read_rows(folder, partial=True)) == QUERIES - 3
    start(small, folder, Empty())
    assert [row.scores for row in read_rows(folder)] == [row.scores for row in rows]
    assert load([folder])["adaptation"].unique().tolist() == ["none"]
    assert head["run"] == hashlib.sha256(canonical_json(head["defines"]).encode()).hexdigest()[:12]
