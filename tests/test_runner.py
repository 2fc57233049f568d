"""Runs: what is stored, taken up after a kill, split, asked again after out-of-memory, and refused."""

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

from fewref.benchmark.judge import Packed, open_pool
from fewref.benchmark.rescore import score_stored
from fewref.benchmark.runner import is_out_of_memory, run, shard_of_process
from fewref.benchmark.store import COSTS, decode_masks, read_header, read_predictions, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_truth
from fewref.episodes.types import Prediction
from fewref.methods.base import Method, MethodInfo
from fewref.methods.controls import CopySupport, Oracle

QUERIES = 24


class Noisy(Method):
    """Random masks from the global generators, shifted by the support: shows every dependence on order and split."""

    info = MethodInfo("noisy", "random masks")
    calls: list[str]

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def adapt(self, support):
        self.calls.append("adapt")
        self.offset = float(torch.rand(())) + support.shots[0].masks.mean()

    def predict(self, query):
        self.calls.append(query.id)
        noise = np.random.random((len(query.frames), *query.frames.shape[2:])) + torch.rand(()).item() + self.offset
        return Prediction(query.id, noise > 1.5, confidence=0.25, input_masks=noise[:, ::2, ::2] > 1.5)


def start(small, out, method=None, **options):
    method = method or Noisy()
    options = {"method_name": method.info.name, "workers": 0, "progress": False, **options}
    return run(method=method, manifest=small.manifest, index=small.index, out=out, **options)


def content(folder, kind: str = "rows", without: tuple[str, ...] = COSTS) -> list[str]:
    """The lines of a file of the run folder, without the fields that time and memory change."""
    lines = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if key not in without}) for line in lines]


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


def copy_cut(source, target, rows: bytes, predictions: bytes):
    target.mkdir()
    for name in ("header.json", "manifest.json"):
        (target / name).write_bytes((source / name).read_bytes())
    (target / "rows.jsonl").write_bytes(rows)
    (target / "predictions.jsonl").write_bytes(predictions)


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


class Hungry(Noisy):
    """Fits `fits` frames of most queries and one frame of `large`."""

    fits, large = 3, ""

    def predict(self, query):
        if self.window > (1 if query.id == self.large else self.fits):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().predict(query)


def test_out_of_memory_halves_the_window(small, whole, tmp_path):
    method = Hungry(window=10)
    method.large = small.manifest.episodes[0].queries[1].id
    result = start(small, tmp_path / "run", method)
    assert [row.window for row in result.rows[:3]] == [2, 1, 2]
    assert {row.window for row in result.rows if row.query != method.large} == {2}
    assert method.window == 10
    assert result.failed == 0
    assert [row.scores for row in result.rows] == [row.scores for row in whole[0].rows]  # seeded afresh each time


def test_out_of_memory_to_the_end(small, tmp_path):
    class Never(Hungry):
        fits = 0

    result = start(small, tmp_path / "run", Never(window=4))
    assert result.exit_code == 3
    assert {row.error for row in result.rows} >= {"out of memory, even with a window of 1 frame"}


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


class Fragile(Noisy):
    """Fails on some queries until it is mended."""

    broken = True

    def predict(self, query):
        if self.broken and query.id.endswith(":1"):
            raise ValueError("two\nlines")
        return super().predict(query)


def test_failed_queries_are_rows_and_are_asked_again(small, tmp_path):
    result = start(small, tmp_path / "run", Fragile())
    failed = [row for row in result.rows if row.status == "failed"]
    assert result.failed == len(failed) == QUERIES / 2
    assert result.exit_code == 3
    assert all(row.error.startswith("ValueError: two lines (test_runner.py:") and not row.scores for row in failed)
    before, method = content(tmp_path / "run"), Fragile()
    again = start(small, tmp_path / "run", method)
    assert content(tmp_path / "run") == before
    assert again.failed == result.failed
    assert "adapt" in method.calls
    assert len(set(method.calls)) == 1
    with pytest.raises(InputError, match="no prediction for .*:1 .*12 of 24 are missing.*start the run again"):
        score_stored(tmp_path / "run", small.manifest, small.index, ["mevis"], tmp_path / "scored", 0, False)
    mended = Fragile()
    mended.broken = False
    assert start(small, tmp_path / "run", mended).exit_code == 0
    mended = Fragile()
    mended.broken = False
    start(small, tmp_path / "straight", mended)
    for kind in ("rows", "predictions"):
        assert content(tmp_path / "run", kind) == content(tmp_path / "straight", kind)


def test_a_failing_adapt_fails_its_queries_only(small, tmp_path):
    class FirstOnly(Noisy):
        def adapt(self, support):
            if support.category == "raccoon":
                raise KeyError("stop")
            super().adapt(support)

    result = start(small, tmp_path / "run", FirstOnly())
    assert {row.category for row in result.rows if row.status == "failed"} == {"raccoon"}
    assert result.failed == QUERIES / 3
    assert "adapt: KeyError: 'stop'" in next(row.error for row in result.rows if row.error)


def test_answers_that_break_the_contract_are_failures(small, tmp_path):
    class Small(Noisy):
        def predict(self, query):
            return Prediction(query.id, np.zeros((3, 5, 5), bool))

    result = start(small, tmp_path / "run", Small())
    assert {row.error for row in result.rows} == {"masks has shape (3, 5, 5), not (3, 22, 30)"}


def test_bad_data_stops_the_run_and_keeps_what_is_finished(small, tmp_path, monkeypatch):
    from fewref.benchmark import runner

    def broken(index, query):
        if query.id == small.manifest.episodes[1].queries[1].id:
            raise InputError("00005.jpg: truncated; fetch it again")
        return load(index, query)

    load = runner.load_query
    monkeypatch.setattr(runner, "load_query", broken)
    with pytest.raises(InputError, match=r"00005\.jpg: truncated"):
        start(small, tmp_path / "run", workers=1)
    kept = len(read_rows(tmp_path / "run", partial=True))
    place = [query.id for episode in small.manifest.episodes for query in episode.queries].index(
        small.manifest.episodes[1].queries[1].id
    )
    assert kept == place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": Noisy(seed=1)}, "seed = 0, not 1"),
        ({"method": Noisy(window=5)}, "window = 10, not 5"),
        ({"method": Noisy(precision="bf16")}, "precision = 'fp32', not 'bf16'"),
        ({"method": CopySupport()}, "class = "),
        ({"scoring": ["mevis"]}, "scoring = .'davis'., not .'mevis'."),
        ({"text": "empty"}, "text = 'right', not 'empty'"),
        ({"support": "none"}, "support = 'right', not 'none'"),
        ({"extras": {"trained_on": 2}}, "extras.trained_on = None, not 2"),
    ],
)
def test_another_run_is_refused(small, whole, change, message):
    before = {path.name: path.read_bytes() for path in whole[1].iterdir()}
    with pytest.raises(InputError, match=rf"header\.json: holds a run with {message}"):
        start(small, whole[1], **change)
    assert {path.name: path.read_bytes() for path in whole[1].iterdir()} == before


def test_other_weights_are_refused(small, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    start(small, tmp_path / "run", Noisy(weights=weights))
    start(small, tmp_path / "run", Noisy(weights=weights))
    weights.write_bytes(b"two")
    with pytest.raises(InputError, match="checkpoint_sha256 = '7692c3"):
        start(small, tmp_path / "run", Noisy(weights=weights))


def test_unknown_names(small, tmp_path):
    with pytest.raises(InputError, match="did you mean 'davis'"):
        start(small, tmp_path / "run", scoring=["dvis"])
    with pytest.raises(InputError, match="no scoring protocol"):
        start(small, tmp_path / "run", scoring=[])
    with pytest.raises(InputError, match="--text 'emty' is unknown: did you mean 'empty'"):
        start(small, tmp_path / "run", text="emty")
    with pytest.raises(InputError, match="--support 'other' is unknown"):
        start(small, tmp_path / "run", support="other")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written.*choose another output folder"):
        start(small, tmp_path / "file" / "run")


def test_rescoring(small, whole, tmp_path):
    _, folder = whole
    direct = start(small, tmp_path / "direct", scoring=["cma-paper", "davis"])
    made = score_stored(folder, small.manifest, small.index, ["cma-paper", "davis"], tmp_path / "out", 0, False)
    assert [row.scores for row in made] == [row.scores for row in direct.rows]
    assert read_rows(tmp_path / "out") == made
    assert made[0].scores["cma-paper"]["size"] == [11, 15]
    assert [row.seconds_predict for row in made] == [row.seconds_predict for row in whole[0].rows]
    header = read_header(tmp_path / "out")["defines"]
    assert header["rescored_from"] == read_header(folder)["run"]
    with pytest.raises(InputError, match="holds a run already"):
        score_stored(folder, small.manifest, small.index, ["davis"], tmp_path / "out", 0, False)


def test_rescoring_refuses_missing_extra_and_damaged_predictions(small, whole, tmp_path):
    rows = (whole[1] / "rows.jsonl").read_bytes()
    lines = (whole[1] / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    name = json.loads(lines[4])["query"]
    cases = {
        f"no prediction for {name} .episode": lines[:4] + lines[5:],
        "prediction for other:0 .* is of no query": [*lines, lines[4].replace(name.encode(), b"other:0")],
        f"two predictions for {name}": [*lines, lines[4]],
        f"prediction for {name} .* no list of COCO RLE": [
            *lines[:4],
            lines[4].replace(b'"size"', b'"siz"'),
            *lines[5:],
        ],
    }
    for number, (message, changed) in enumerate(cases.items()):
        copy_cut(whole[1], tmp_path / str(number), rows, b"".join(changed))
        with pytest.raises(InputError, match=message):
            score_stored(tmp_path / str(number), small.manifest, small.index, ["davis"], tmp_path / "out", 0, False)
    assert not (tmp_path / "out").exists()


def test_scoring_processes_need_no_pytorch():
    with open_pool(1) as pool:
        assert pool.submit(eval, "'torch' in __import__('sys').modules").result() is False
        masks = np.random.default_rng(0).random((3, 5, 7)) > 0.5
        assert np.array_equal(pool.submit(Packed.masks, Packed.of(masks)).result(), masks)
