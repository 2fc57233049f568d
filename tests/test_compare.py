"""Paired differences, Holm's correction, ranks and ablations, against hand calculations and loops."""

from __future__ import annotations

import numpy as np
import pytest
from handmade import PLAN, make_manifest, noisy, per_draw, write_run

from fewref.benchmark.aggregate import MEAN, resample_weights
from fewref.benchmark.compare import ablations, adaptations, compare, holm, ranks, two_sided
from fewref.benchmark.provenance import plain
from fewref.benchmark.results import load
from fewref.benchmark.store import read_rows
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import AdaptOptions

WHOLE = {"cat": PLAN["cat"], "dog": PLAN["dog"]}


def shifted(by: float, key: str = "a"):
    """The scores of `noisy(key, 0.4)`, each less by a constant."""

    def score(episode, query):
        j, f = noisy(key, 0.4, 0.1)(episode, query)
        return [value - by for value in j], [value - by for value in f]

    return score


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5, 0.9]).tolist() == [1.0, 1.0, 1.0]
    assert holm([0.02]).tolist() == [0.02]
    assert holm([]).tolist() == []


def test_two_sided_p_by_hand():
    assert two_sided(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * (1 + 1) / 100)
    assert two_sided(np.array([-1.0] * 99)) == pytest.approx(2 / 100)
    assert two_sided(np.zeros(99)) == 1.0


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two methods over groups 1 and 2; the second asks fewer categories."""
    root = tmp_path_factory.mktemp("sides")
    manifests = [make_manifest("1"), make_manifest("2", WHOLE)]
    a = [write_run(root / f"a{m.group}", m, noisy("a", 0.6), "a") for m in manifests]
    return a, [write_run(root / f"b{m.group}", m, noisy("b", 0.5), "b") for m in manifests]


def test_difference_is_that_of_the_means(sides):
    found = compare(*sides).set_index("group")
    means = [[np.mean(list(per_draw(read_rows(folder), "davis").values())) for folder in side] for side in sides]
    differences = np.subtract(*means)
    assert found.loc[["1", "2", MEAN], "difference"].tolist() == pytest.approx([*differences, differences.mean()])
    assert found.loc[MEAN, ["a", "b"]].tolist() == pytest.approx(np.mean(means, axis=1).tolist())
    assert found.loc[["1", "2"], "p_holm"].tolist() == holm(found.loc[["1", "2"], "p"].tolist()).tolist()
    assert found.loc[MEAN, "p_holm"] == found.loc[MEAN, "p"]
    assert found["entry_a"].unique().tolist() == ["a (a1, a2)"]


def test_interval_of_the_difference_against_loops(sides):
    found = compare(*sides, resamples=60).set_index("group")
    drawn = []
    for number, group in enumerate("12"):
        rows = [read_rows(side[number]) for side in sides]
        clusters = sorted({(row.category, row.video) for row in rows[0]})
        values = []
        for line in resample_weights("mini-ref-youtube-vos", group, clusters, 60).astype(int).tolist():
            repeats = dict(zip(clusters, line, strict=True))
            a, b = (np.mean(list(per_draw(part, "davis", repeats).values())) for part in rows)
            values.append(a - b)
        drawn.append(values)
    for group, values in (("1", drawn[0]), ("2", drawn[1]), (MEAN, np.mean(drawn, axis=0))):
        expected = [*np.percentile(values, [2.5, 97.5]), two_sided(np.array(values))]
        assert found.loc[group, ["low", "high", "p"]].tolist() == pytest.approx(expected, abs=2e-12)


def test_a_constant_difference_has_no_width_and_equal_runs_no_difference(tmp_path):
    manifest = make_manifest("1", WHOLE)
    folders = [write_run(tmp_path / str(by), manifest, shifted(by), f"m{by}") for by in (0, 0.125)]
    folders.append(write_run(tmp_path / "same", manifest, shifted(0), "same"))
    line = compare(folders[0], folders[1]).iloc[-1]
    assert line[["difference", "low", "high"]].tolist() == pytest.approx([0.125] * 3)
    assert line["p"] == pytest.approx(2 / 2001)
    back = compare(folders[1], folders[0]).iloc[-1]
    assert (back["difference"], back["p"]) == (pytest.approx(-0.125), line["p"])
    same = compare(folders[0], folders[2]).iloc[-1]
    assert same[["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]


def test_ranks_share_ties_and_leave_out_what_cannot_be_ranked(tmp_path):
    first, second = make_manifest("1", WHOLE), make_manifest("2", WHOLE)

    def add(name, score, groups=(first, second), **options):
        return [write_run(tmp_path / f"{name}{m.group}", m, score, name, **options) for m in groups]

    folders = add("best", shifted(0)) + add("near", noisy("other", 0.399, 0.1)) + add("low", shifted(0.2))
    folders += add("lower", shifted(0.3)) + add("oracle", noisy("o", 0.9), sees_truth=True)
    folders += add("half", noisy("h", 0.9), [first]) + add("begun", noisy("h", 0.9), keep=30)
    frame = load(folders, partial=True)
    found = ranks(frame).set_index("entry")
    assert found["rank"].to_dict() == {"best": 1, "near": 1, "low": 3, "lower": 4}
    leader = found["best"].unique().tolist()
    assert leader == [min(["best", "near"], key=lambda name: -_mean(frame, name))]
    assert np.isnan(found.loc[leader[0], "difference"])
    assert found.loc["lower", "difference"] == pytest.approx(_mean(frame, leader[0]) - _mean(frame, "lower"))
    others = found.drop(index=leader[0])
    assert others["p_holm"].tolist() == holm(others["p"].tolist()).tolist()
    assert others.query("rank > 1")["p_holm"].max() < 0.05 < others.query("rank == 1")["p_holm"].min()


def _mean(frame, entry):
    rows = frame[frame["entry"] == entry]
    by_category = rows.groupby(["group", "seed", "category"])["jf"].mean()
    return by_category.groupby(["group", "seed"]).mean().groupby("group").mean().mean()


def test_ablations_against_their_origin(tmp_path):
    manifest = make_manifest("1", WHOLE)
    sha = "5" * 64
    folders = [
        write_run(tmp_path / "right", manifest, shifted(0), checkpoint_sha256=sha),
        write_run(tmp_path / "empty", manifest, shifted(0.0625), text="empty", checkpoint_sha256=sha),
        write_run(tmp_path / "none", manifest, noisy("n", 0.4, 0.1), support="none", checkpoint_sha256=sha),
        write_run(tmp_path / "weights", manifest, shifted(0.1), text="other", checkpoint_sha256="6" * 64),
        write_run(tmp_path / "alone", manifest, shifted(0.1), "alone", text="other"),
    ]
    found = ablations(load(folders)).set_index("entry")
    assert found.loc["m [text empty]", ["difference", "low", "high"]].tolist() == pytest.approx([0.0625] * 3)
    assert found.loc["m [text empty]", "origin"] == "m"
    tested = ["m [support none]", "m [text empty]"]
    assert found.loc[tested, "p_holm"].tolist() == holm(found.loc[tested, "p"].tolist()).tolist()
    assert found["note"].map(lambda note: note.split()[-1] if note else "").to_dict() == {
        "alone [text other]": "these",
        "m [support none]": "",
        "m [text empty]": "",
        "m [text other]": "weights",
    }
    assert found.loc[["alone [text other]", "m [text other]"], "difference"].isna().all()


def test_adaptations_are_paired_with_the_same_method_as_it_is(tmp_path):
    manifest, sha = make_manifest("1", WHOLE), "5" * 64

    def add(name, score, strategy=None, method="m", **options):
        changes = {"adaptation": plain(AdaptOptions(strategy))} if strategy else {}
        return write_run(tmp_path / name, manifest, score, method, **{"checkpoint_sha256": sha, **changes, **options})

    zero, fine = add("zero", shifted(0.25)), add("fine", shifted(0), "finetune")
    other = add("head", shifted(0.125), "head")
    folders = [zero, fine, other, add("text", shifted(0.1), text="empty"), add("alone", shifted(0), "head", "alone")]
    folders.append(add("fine-text", shifted(0), "finetune", text="empty"))
    found = adaptations(load(folders)).set_index("entry")
    assert found.loc["m + finetune", ["difference", "low", "high"]].tolist() == pytest.approx([0.25] * 3)
    assert found.loc["m + head", "difference"] == pytest.approx(0.125)
    assert found.loc["m + finetune [text empty]", "difference"] == pytest.approx(0.1)
    assert found["origin"].to_dict() == {
        "alone + head": "",
        "m + finetune": "m",
        "m + finetune [text empty]": "m [text empty]",
        "m + head": "m",
    }
    tested = found[found["origin"] != ""]
    assert tested["p_holm"].tolist() == holm(tested["p"].tolist()).tolist()
    assert found["note"].tolist() == ["the run without adaptation is not among these", "", "", ""]
    line = compare(fine, zero).set_index("group").loc[MEAN]
    assert line[["difference", "low", "high"]].tolist() == pytest.approx([0.25] * 3)
    assert (line["entry_a"], line["entry_b"]) == ("m + finetune (fine)", "m (zero)")
    less = make_manifest("1", WHOLE, draws=2)
    fewer = write_run(tmp_path / "fewer", less, shifted(0), "m", adaptation=plain(AdaptOptions("head")))
    with pytest.raises(InputError, match="episode protocol"):
        compare(fewer, zero)
    with pytest.raises(InputError, match="a side of a comparison is one method"):
        compare([fine, other], zero)


def test_refusals_of_compare(sides, tmp_path):
    a, b = sides
    manifest = make_manifest("1", WHOLE)
    elsewhere = write_run(tmp_path / "elsewhere", manifest, noisy("a"), "b")
    mevis = write_run(tmp_path / "mevis", make_manifest("1"), noisy("a"), "b", scoring=["mevis"])
    draws = write_run(tmp_path / "draws", make_manifest("1", draws=2), noisy("a"), "b")
    begun = write_run(tmp_path / "begun", make_manifest("1"), noisy("a"), "b", keep=9)
    for x, y, message in (
        (a[0], elsewhere, "a1 and .*elsewhere: ask different questions .* run both on one manifest"),
        (a[0], mevis, "scored by davis against mevis; use `score`"),
        (a[0], draws, "episode protocol .*supports 3.* against .*supports 2"),
        (a[0], begun, "unfinished, 72 of 81"),
        (a[0], b, "groups 1 against 1 2"),
        ([a[0], b[0]], [b[1]], "a side of a comparison is one method .* these are a, mini-ref-youtube-vos, and b"),
        (a[0], a[0], "named twice"),
        (a[0], tmp_path / "nothing", "no run folder"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            compare(x, y)
        assert "\n" not in str(caught.value)
