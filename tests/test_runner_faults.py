"""Runs: asked again after out-of-memory, failed queries, refused input, and rescoring."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from noisy_runs import QUERIES, Noisy, content, copy_cut, start

from fewref.benchmark import units
from fewref.benchmark.asker import is_out_of_memory
from fewref.benchmark.judge import Packed, open_pool
from fewref.benchmark.rescore import score_stored
from fewref.benchmark.store import read_header, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction
from fewref.methods.controls import CopySupport


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return start(small, folder), folder


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


def test_out_of_memory_takes_windows_one_by_one_first(small, whole, tmp_path):
    class Wide(Noisy):
        asked: list[tuple[int, int]] = []

        def predict(self, query):
            self.asked.append((self.batch, self.window))
            if self.batch * self.window > (3 if query.id == first else 10):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().predict(query)

    first = small.manifest.episodes[0].queries[0].id
    method = Wide(window=10, batch=4)
    result = start(small, tmp_path / "run", method)
    assert Wide.asked[:6] == [(4, 10), (1, 10), (1, 5), (1, 2), (4, 10), (1, 10)]
    assert [row.window for row in result.rows[:3]] == [2, 10, 10]
    assert (method.batch, method.window) == (4, 10)
    assert [row.scores for row in result.rows] == [row.scores for row in whole[0].rows]


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
    assert all(
        row.error.startswith("ValueError: two lines (test_runner_faults.py:") and not row.scores for row in failed
    )
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
    def broken(index, queries):
        if bad in [query.id for query in queries]:
            raise InputError("00005.jpg: truncated; fetch it again")
        return load(index, queries)

    load, bad = units.load_queries, small.manifest.episodes[1].queries[2].id
    monkeypatch.setattr(units, "load_queries", broken)
    with pytest.raises(InputError, match=r"00005\.jpg: truncated"):
        start(small, tmp_path / "run", workers=1)
    kept = len(read_rows(tmp_path / "run", partial=True))
    place = [query.id for episode in small.manifest.episodes for query in episode.queries].index(bad)
    assert kept == place == 2


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
