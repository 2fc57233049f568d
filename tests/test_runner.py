"""Runs: what is stored, taken up after a kill, and split."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noisy_runs import QUERIES, Noisy, content, copy_cut, start

from fewref.benchmark import runner
from fewref.benchmark.judge import device_counts
from fewref.benchmark.runner import shard_of_process
from fewref.benchmark.store import COSTS, decode_masks, read_header, read_predictions, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_truth
from fewref.methods.controls import CopySupport, Oracle


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return start(small, folder), folder


def test_rows_predictions_and_order(small, whole):
    result, folder = whole
    assert (result.failed, result.exit_code) == (0, 0)
    order = [(episode.id, query.id) for episode in small.manifest.episodes for query in episode.queries]
    assert len(order) == QUERIES
    assert [row.key for row in result.rows] == order
    assert read_rows(folder) == result.rows
    assert [key for key, _ in read_predictions(folder)] == order
    row = result.rows[0]
    assert row.scores["davis"]["size"] == [22, 30]
    assert len(row.scores["davis"]["j"]) == len(row.scores["davis"]["f"]) == row.frames == 3
    assert row.means("davis")[0] == pytest.approx(sum(row.scores["davis"]["j"]) / 3)
    assert row.peak_bytes > 1 << 20
    assert row.seconds_predict > 0


def test_scores_belong_to_the_stored_masks(small, whole):
    _, folder = whole
    rows = {row.key: row for row in read_rows(folder)}
    episodes = {episode.id: episode for episode in small.manifest.episodes}
    for key, line in read_predictions(folder):
        masks, episode = decode_masks(line["masks"]), episodes[key[0]]
        place = [query.id for query in episode.queries].index(key[1])
        truth = load_truth(small.index, episode.queries[place], episode.targets[place])
        j = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, truth, strict=True)]
        assert rows[key].scores["davis"]["j"] == pytest.approx(j, abs=1e-12)
        assert decode_masks(line["input_masks"]).shape == (3, 11, 15)


def test_oracle_scores_full_marks_and_adapt_runs_once_per_episode(small, tmp_path):
    result = start(small, tmp_path / "o", Oracle(), scoring=["davis", "mevis"])
    assert {row.means(name) for row in result.rows for name in ("davis", "mevis")} == {(1.0, 1.0)}
    method = Noisy()
    start(small, tmp_path / "n", method)
    assert method.calls.count("adapt") == len(small.manifest.episodes)


def test_a_pool_gives_the_same_rows(small, whole, tmp_path):
    start(small, tmp_path / "pool", workers=1)
    for kind in ("rows", "predictions"):
        assert content(tmp_path / "pool", kind) == content(whole[1], kind)


def test_who_counts_for_the_scores(monkeypatch):
    """A GPU where the method runs on one, unless its memory is full; else the scoring processes."""
    masks, asked = np.ones((2, 5, 6), bool), []
    monkeypatch.setattr(
        runner, "device_counts", lambda *given: asked.append(given[3]) or device_counts(*given[:3], "cpu")
    )
    assert runner.counted(["davis"], masks, masks, "cpu") is None
    assert asked == []
    counts = runner.counted(["davis"], masks, masks, "cuda:0")
    assert asked == ["cuda:0"]
    assert counts["davis"][:, :2].tolist() == [[30, 30], [30, 30]]

    def full(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "device_counts", full)
    assert runner.counted(["davis"], masks, masks, "cuda:0") is None


def test_taken_up_after_a_kill_at_any_point(small, tmp_path):
    short = dataclasses.replace(small.manifest, episodes=small.manifest.episodes[1:3])
    small, folder = SimpleNamespace(index=small.index, manifest=short), tmp_path / "straight"
    start(small, folder)
    rows = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    predictions = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(rows) == len(predictions) == 8
    for done in range(len(rows) + 1):
        torn_row, torn_prediction = b"".join(rows[done : done + 1])[:-40], b"".join(predictions[done : done + 1])[:-1]
        states = {
            "between": (b"".join(rows[:done]), b"".join(predictions[:done])),
            "in a row": (b"".join(rows[:done]) + torn_row, b"".join(predictions[: done + 1])),
            "in a prediction": (b"".join(rows[:done]), b"".join(predictions[:done]) + torn_prediction),
        }
        for name, state in states.items():
            target, method = tmp_path / f"{done} {name}", Noisy()
            copy_cut(folder, target, *state)
            start(small, target, method)
            assert content(target) == content(folder), (done, name)
            assert (target / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()
            asked = [call for call in method.calls if call != "adapt"]
            assert asked == [json.loads(row)["query"] for row in rows[done:]], (done, name)
            assert (target / "rows.jsonl").read_bytes().splitlines(keepends=True)[:done] == rows[:done]


def test_damage_in_the_middle_is_refused_not_repaired(small, whole, tmp_path):
    rows = (whole[1] / "rows.jsonl").read_bytes().splitlines(keepends=True)
    copy_cut(whole[1], tmp_path / "run", rows[0] + b"{}\n" + rows[2], b"")
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2 is damaged"):
        start(small, tmp_path / "run")


SLOW = """
import sys, time
from pathlib import Path
from fewref.benchmark.runner import run
from fewref.episodes.manifest import read_manifest
from fewref.episodes.readers import read_index
from fewref.methods.controls import CopySupport

class Slow(CopySupport):
    def predict(self, query):
        time.sleep(float(sys.argv[4]))
        return super().predict(query)

if __name__ == "__main__":
    manifest = read_manifest(Path(sys.argv[2]))
    run(method=Slow(), method_name="slow", manifest=manifest, index=read_index(manifest.dataset, Path(sys.argv[1])),
        out=Path(sys.argv[3]), progress=False, workers=1)
"""


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def wait_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_real_kill(small, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    killed, rows = tmp_path / "killed", tmp_path / "killed/rows.jsonl"
    command = [sys.executable, "-P", str(script), str(small.root), str(small.path), str(killed)]
    process = subprocess.Popen([*command, "0.2"], env=environment)
    assert wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 3)
    scorers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = rows.read_bytes().splitlines(keepends=True)
    assert 3 <= len(finished) < QUERIES
    assert wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in scorers), 20), "orphaned processes"
    subprocess.run([*command, "0"], check=True, env=environment)
    assert rows.read_bytes().splitlines(keepends=True)[: len(finished) - 1] == finished[:-1]
    assert len(read_header(killed)["resumed"]) == 1
    straight = tmp_path / "straight"
    start(small, straight, CopySupport(), method_name="slow")
    unlike = (*COSTS, "run")  # the class is another, so the run is too
    assert content(killed, without=unlike) == content(straight, without=unlike)
    assert (killed / "predictions.jsonl").read_bytes() == (straight / "predictions.jsonl").read_bytes()


def test_interrupted_from_the_keyboard(small, whole, tmp_path):
    class Interrupted(Noisy):
        def predict(self, query):
            if len(self.calls) == 9:
                raise KeyboardInterrupt
            return super().predict(query)

    Interrupted.__qualname__, Interrupted.__module__ = Noisy.__qualname__, Noisy.__module__
    with pytest.raises(KeyboardInterrupt):
        start(small, tmp_path / "run", Interrupted())
    with pytest.raises(InputError, match="unfinished, 17 of 24 queries are missing .first: "):
        read_rows(tmp_path / "run")
    assert len(read_rows(tmp_path / "run", partial=True)) == 7
    start(small, tmp_path / "run")
    assert content(tmp_path / "run") == content(whole[1])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_join_to_the_whole(small, whole, tmp_path, count):
    for number in reversed(range(count)):
        start(small, tmp_path / "run", shard=(number, count))
    costless = [{**row.__dict__, **dict.fromkeys(COSTS)} for row in read_rows(tmp_path / "run")]
    assert costless == [{**row.__dict__, **dict.fromkeys(COSTS)} for row in whole[0].rows]
    assert sorted(map(str, read_predictions(tmp_path / "run"))) == sorted(map(str, read_predictions(whole[1])))
    with pytest.raises(InputError, match=f"holds a run in {count} pieces, not 1"):
        start(small, tmp_path / "run")


def test_a_missing_shard_is_noticed(small, tmp_path):
    start(small, tmp_path / "run", shard=(0, 2))
    with pytest.raises(InputError, match="unfinished, 12 of 24 queries"):
        read_rows(tmp_path / "run")


def test_torchrun_shards(monkeypatch):
    assert shard_of_process(None) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of_process(None) == (2, 4)
    with pytest.raises(InputError, match="torchrun"):
        shard_of_process((0, 2))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(InputError, match="--shard 2/2: the first number goes from 0 to 1"):
        shard_of_process((2, 2))
