"""Means, spreads and intervals against slow loops over the rows; what `load` accepts, names and refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from handmade import PLAN, make_manifest, noisy, per_draw, write_run

from fewref.benchmark.aggregate import MEAN, resample_weights, resampled, summary
from fewref.benchmark.results import load
from fewref.benchmark.runner import run
from fewref.benchmark.scoring import QueryScore, pool_frames
from fewref.benchmark.store import read_rows
from fewref.episodes.errors import InputError
from fewref.methods.controls import CopySupport, Oracle

PROTOCOLS = ("davis", "cma-paper", "danet-paper")


def some_failed(episode, query):
    failed = (episode.seed, query.id) in {(0, "c1:0"), (2, "d3:1")}
    return None if failed else noisy("a")(episode, query)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One method over two groups, scored by three protocols; two queries of the first group failed."""
    root = tmp_path_factory.mktemp("runs")
    second = make_manifest("2", {"owl": PLAN["cat"], "yak": PLAN["dog"]})
    first = write_run(root / "g1", make_manifest("1"), some_failed, scoring=PROTOCOLS)
    return [first, write_run(root / "g2", second, noisy("b", 0.7), scoring=PROTOCOLS)]


@pytest.mark.parametrize("scoring", PROTOCOLS)
def test_means_and_spread_against_loops(folders, scoring):
    found = summary(load(folders, scoring)).set_index("group")
    draws = {group: per_draw(read_rows(folder), scoring) for group, folder in zip("12", folders, strict=True)}
    means = {group: np.mean(list(values.values()), axis=0) for group, values in draws.items()}
    means[MEAN] = (means["1"] + means["2"]) / 2
    for group, (j, f) in means.items():
        assert found.loc[group, ["j", "f", "jf"]].tolist() == pytest.approx([j, f, (j + f) / 2], abs=2e-12)
    together = [np.mean([draws["1"][draw], draws["2"][draw]]) for draw in range(3)]
    assert found.loc[MEAN, "spread"] == pytest.approx(np.std(together, ddof=1), abs=2e-12)
    assert found.loc["2", "spread"] == pytest.approx(np.std([v.mean() for v in draws["2"].values()], ddof=1), abs=2e-12)


@pytest.mark.parametrize(("scoring", "slot"), [("cma-paper", None), ("danet-paper", "category")])
def test_pooled_protocols_agree_with_the_accumulator(folders, scoring, slot):
    rows = read_rows(folders[1])
    values = []
    for draw in range(3):
        some = [row for row in rows if row.seed == draw]
        scores = [QueryScore(row.scores[scoring]["j"], row.scores[scoring]["f"], 4, 5, 1, 2, 8) for row in some]
        pooled = pool_frames(scores, [getattr(row, slot) if slot else "all" for row in some])
        values.append((pooled.mean_j, pooled.mean_f))
    line = summary(load(folders[1:], scoring)).iloc[0]
    assert (line["j"], line["f"]) == pytest.approx(tuple(np.mean(values, axis=0)), abs=2e-12)
    assert line["iou"] == 0.25


def test_a_category_of_many_queries_weighs_as_much_as_one_of_few(tmp_path):
    plan = {"cat": {f"c{n}": (3, 2) for n in range(9)}, "dog": {"d0": (1, 8)}}
    score = {"cat": ([0.2, 0.4], [0.0, 0.0]), "dog": ([1.0] * 8, [1.0] * 8)}
    manifest = make_manifest("1", plan, draws=1)
    folder = write_run(tmp_path / "r", manifest, lambda e, q: score[e.category], scoring=PROTOCOLS)
    found = summary(load([folder])).query("group == '1'").set_index("scoring")
    assert found["j"].to_dict() == pytest.approx({"davis": 0.65, "danet-paper": 0.65, "cma-paper": (27 * 0.6 + 8) / 62})
    same = ["jf_query_category", "jf_query_group", "jf_frame_category", "jf_frame_group"]
    expected = [(0.15 + 1) / 2, (27 * 0.15 + 1) / 28, (0.15 + 1) / 2, (27 * 0.3 + 8) / 62]
    assert found.loc["davis", same].tolist() == pytest.approx(expected)
    assert np.isnan(found.loc["davis", "spread"])


def test_counts_costs_and_notes(folders):
    found = summary(load(folders, "davis")).set_index("group")
    first = found.loc["1"]
    queries = 3 * (12 + 10 + 5)
    assert first[["queries", "failed", "missing", "videos", "draws", "episodes_asked"]].tolist() == [
        queries,
        2,
        0,
        13,
        3,
        9,
    ]
    rows = read_rows(folders[0])
    good = [row for row in rows if row.status == "ok"]
    assert first["frames"] == sum(row.frames for row in rows)
    assert first["seconds_adapt"] == 20
    assert first["seconds_predict"] == pytest.approx(sum(row.seconds_predict for row in good) / len(good))
    assert (first["peak_bytes"], first["parameters"]) == (3 << 20, 1500000)
    assert np.isnan(first["iou"])
    assert "2 of 81 queries failed and count as 0" in first["notes"]
    assert "1 of 3 categories have fewer than 5 query videos" in first["notes"]
    assert found.loc["2", "notes"] == ""
    assert found.loc[MEAN, "queries"] == found.loc["1", "queries"] + found.loc["2", "queries"]


@pytest.mark.parametrize("scoring", PROTOCOLS)
@pytest.mark.parametrize("skip", [lambda *_: False, lambda category, draw, video: (int(video[1:]) + draw) % 2 == 0])
def test_interval_against_a_loop_over_the_same_draws(tmp_path, scoring, skip):
    """The second case asks every draw about other videos, so that a resample may leave a category empty in a draw."""
    folder = write_run(tmp_path / "r", make_manifest("1", skip=skip), noisy("a"), scoring=PROTOCOLS)
    frame, rows = load([folder], scoring), read_rows(folder)
    clusters = sorted({(row.category, row.video) for row in rows})
    weights = resample_weights(frame["dataset"][0], "1", clusters, 40)
    slow = []
    for line in weights.astype(int):
        found = per_draw(rows, scoring, dict(zip(clusters, line.tolist(), strict=True)))
        slow.append(np.mean(list(found.values())))
    average = {"davis": ("query", "category"), "cma-paper": ("frame", "group"), "danet-paper": ("frame", "category")}
    assert resampled(frame, *average[scoring], 40).tolist() == pytest.approx(slow, abs=2e-12)
    line = summary(frame, resamples=40).iloc[0]
    assert (line["low"], line["high"]) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=2e-12)


def test_weights_draw_as_many_videos_as_a_category_has():
    clusters = [("cat", f"c{n}") for n in range(7)] + [("dog", "d0")] + [("fox", f"f{n}") for n in range(3)]
    weights = resample_weights("d", "1", clusters, 3000)
    for part, size in ((slice(0, 7), 7), (slice(7, 8), 1), (slice(8, 11), 3)):
        assert set(weights[:, part].sum(axis=1)) == {size}
    assert weights.mean(axis=0) == pytest.approx(np.ones(11), abs=0.1)
    assert weights[:, 0].var() == pytest.approx(6 / 7, abs=0.1)  # n p (1 - p)
    assert np.array_equal(resample_weights("d", "1", clusters[7:], 3000), weights[:, 7:])
    assert not np.array_equal(resample_weights("d", "2", clusters, 3000), weights)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Videos with an offset of their own and three sentences each: resampling sentences would cover far less often."""
    rng, hits, tries = np.random.default_rng(5), 0, 200
    keys = {"dataset": "d", "category": "cat", "seed": 0, "episode": "e", "scoring": "davis", "frames": 1}
    for number in range(tries):
        offsets = rng.normal(0.5, 0.1, 40)
        scores = np.repeat(offsets, 3) + rng.normal(0, 0.01, 120)
        videos = np.repeat([f"v{n:02d}" for n in range(40)], 3)
        rows = pd.DataFrame({"video": videos, "query": np.arange(120), "j": scores, "f": scores, "group": str(number)})
        low, high = np.percentile(resampled(rows.assign(**keys), "query", "category", 400), [2.5, 97.5])
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / tries <= 0.985


def test_order_of_rows_and_folders_does_not_matter(folders):
    frame = load(folders)
    pd.testing.assert_frame_equal(load(folders[::-1]), frame)
    shuffled = frame.sample(frac=1, random_state=np.random.RandomState(1))
    pd.testing.assert_frame_equal(summary(shuffled, 100), summary(frame, 100))


def test_runs_of_the_runner(small, tmp_path):
    folders = []
    for method, support in ((Oracle(), "right"), (CopySupport(), "right"), (CopySupport(), "other-category")):
        folders.append(tmp_path / f"{method.info.name}-{support}")
        options = {"manifest": small.manifest, "index": small.index, "workers": 0, "progress": False}
        run(method=method, method_name=method.info.name, out=folders[-1], support=support, **options)
    frame = load(folders)
    names = ["copy-support", "copy-support [support other-category]", "oracle"]
    assert frame["entry"].unique().tolist() == names
    assert frame.groupby("entry").size().tolist() == [24, 24, 24]
    found = summary(frame).query("group == 'mean'").set_index("entry")
    assert found.loc["oracle", ["j", "f", "low", "high", "spread", "iou"]].tolist() == [1, 1, 1, 1, 0, 1]
    plain = np.mean([row.means("davis") for row in read_rows(folders[1])], axis=0)  # all categories are alike here
    assert found.loc["copy-support", ["j", "f"]].tolist() == pytest.approx(plain.tolist())


def entries_of(folders) -> list[str]:
    frame = load(folders)
    return frame.drop_duplicates("folder").sort_values("folder")["entry"].tolist()


def test_what_tells_runs_of_a_method_apart(tmp_path):
    first, second = make_manifest("1", draws=1), make_manifest("2", draws=1)
    a = [write_run(tmp_path / f"a{m.group}", m, noisy("a"), checkpoint_sha256=m.group * 64) for m in (first, second)]
    b = [write_run(tmp_path / f"b{m.group}", m, noisy("a"), precision="bf16") for m in (first, second)]
    c = write_run(tmp_path / "c", first, noisy("a"), checkpoint_sha256="7" * 64)
    d = write_run(tmp_path / "d", first, noisy("a"), text="empty", support="none")
    e = write_run(tmp_path / "e", first, noisy("a"), extras={"steps": 3})
    assert entries_of(a) == ["m", "m"]
    assert entries_of([*a, *b]) == ["m, precision fp32"] * 2 + ["m, precision bf16"] * 2
    assert entries_of([a[0], c]) == [f"m, checkpoint {'1' * 12}", f"m, checkpoint {'7' * 12}"]
    assert entries_of([a[0], d]) == ["m", "m [text empty, support none]"]
    assert entries_of([a[0], e]) == ["m, extras {}", 'm, extras {"steps":3}']
    with pytest.raises(InputError, match=r"a1 and c: both are m on .*group 1; leave one out"):
        load([*a, c])


def test_refusals_of_load(folders, tmp_path):
    manifest = make_manifest("1", draws=1)
    unfinished = write_run(tmp_path / "u", manifest, noisy("a"), keep=5)
    other = write_run(tmp_path / "o", make_manifest("1", {"cat": PLAN["cat"]}), noisy("a"), "other")
    for wrong, message in (
        (([],), "no run folder is named"),
        (([tmp_path / "no"],), "no run folder"),
        (([folders[0], folders[0]],), "named twice"),
        (([unfinished],), "unfinished, 22 of 27"),
        (([write_run(tmp_path / "z", manifest, noisy("a"), keep=0)], None, True), "no query is finished"),
        (([folders[0]], "davsi"), "did you mean 'davis'"),
        (([folders[0]], "mevis"), "scored by davis, cma-paper, danet-paper, not mevis; use `score`"),
        (([folders[0], other],), "g1 and .*/o: ask different questions"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(*wrong)
        assert "\n" not in str(caught.value)
    found = summary(load([unfinished], partial=True)).iloc[0]
    assert (found["queries"], found["missing"]) == (5, 22)
    assert "unfinished, 22 of 27 queries are missing" in found["notes"]


def test_refuses_a_damaged_header_and_a_foreign_manifest(folders, tmp_path):
    for name, change, message in (
        ("a", lambda header: header["defines"].pop("window"), "header is damaged"),
        ("b", lambda header: header["defines"].update(manifest_hash="0" * 64), "not the one of its header"),
    ):
        folder = tmp_path / name
        shutil.copytree(folders[0], folder)
        header = json.loads((folder / "header.json").read_text())
        change(header)
        (folder / "header.json").write_text(json.dumps(header))
        with pytest.raises(InputError, match=message):
            load([folder])
