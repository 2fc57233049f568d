"""The tables: the same numbers in every form, marks, sections, and a leaderboard that only repeats what is on disk."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import pandas as pd
import pytest
from handmade import make_manifest, noisy, write_run

from fewref.benchmark import table
from fewref.benchmark.aggregate import summary
from fewref.benchmark.provenance import plain
from fewref.benchmark.results import load
from fewref.benchmark.runner import run
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.controls import CopySupport, Empty, Oracle

SHA = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two methods, an ablation and an oracle over two groups, under two scoring protocols."""
    root = tmp_path_factory.mktemp("runs")
    found = []
    for manifest in (make_manifest("1"), make_manifest("2")):
        runs = (
            ("a", noisy("a", 0.6), {"checkpoint_sha256": SHA}),
            ("b", noisy("b", 0.3), {}),
            ("a", noisy("c", 0.4), {"checkpoint_sha256": SHA, "text": "empty"}),
            ("oracle", lambda _, query: ([1.0] * len(query.clip.frames),) * 2, {"sees_truth": True}),
        )
        for number, (method, score, options) in enumerate(runs):
            folder = root / f"run{number}" / manifest.group
            found.append(write_run(folder, manifest, score, method, ("davis", "cma-paper"), **options))
    return found


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Two methods, one of them adapted in three ways, one in two, over two groups."""
    root, found = tmp_path_factory.mktemp("adapted"), []
    sha = {"checkpoint_sha256": SHA}
    for group in ("1", "2"):
        manifest = make_manifest(group)

        def add(name, score, method, strategy="none", manifest=manifest, costs=(0, 0), **options):
            folder = root / name / manifest.group
            if strategy != "none":
                options["adaptation"] = plain(AdaptOptions(strategy))
            found.append(write_run(folder, manifest, score, method, costs=costs, **{**sha, **options}))

        add("a", noisy("a", 0.5), "a")
        add("a-fine", noisy("a-fine", 0.7), "a", "finetune", costs=(20, 1_060_000))
        add("a-maml", noisy("a-maml", 0.4), "a", "maml", costs=(5, 2_000_000), checkpoint_sha256="f" + SHA[1:])
        add("a-self", noisy("a-self", 0.45), "a", "self-train", costs=(7, 3))
        add("b", noisy("b", 0.6), "b")
        add("b-fine", noisy("b-fine", 0.6), "b", "finetune", costs=(20, 10), checkpoint_sha256="f" + SHA[1:])
        add("c-maml", noisy("c", 0.2), "c", "maml", costs=(5, 10))
        add("a-fine-empty", noisy("e", 0.3), "a", "finetune", text="empty")
    return found


def test_adapted_rows_stand_below_their_zero_shot_row_with_gain_and_costs(adapted):
    part = table.wide(load(adapted))
    ranked = part[part["kind"] == "method"]
    assert ranked["method"].tolist() == [
        "a",
        "a + finetune",
        "a + self-train (transductive)",
        "a + maml",
        "b",
        "b + finetune",
        "c + maml",
    ]
    by_name = part.set_index("method")
    assert by_name.loc["a + finetune", "rank"] == "1"
    assert by_name["over"].to_dict() == {
        "a": "-",
        "a + finetune": "a",
        "a + self-train (transductive)": "a",
        "a + maml": "a",
        "b": "-",
        "b + finetune": "b",
        "c + maml": "-",
        "a + finetune [text empty]": "-",
    }
    for entry in ("a + finetune", "a + maml", "a + self-train (transductive)"):
        gain = float(by_name.loc[entry, "J&F"]) - float(by_name.loc["a", "J&F"])
        assert float(by_name.loc[entry, "gain"]) == pytest.approx(gain, abs=0.11)
    assert by_name.loc["b + finetune", "gain"] == by_name.loc["c + maml", "gain"] == "-"
    line = by_name.loc["a + finetune"]
    assert line[["adaptation", "gradient steps", "trained, M", "adapt, s/episode"]].tolist() == [
        "finetune",
        "20",
        "1.06",
        "20",
    ]
    assert by_name.loc["a", ["adaptation", "gradient steps", "trained, M"]].tolist() == ["none", "0", "0.00"]
    queries = len(load(adapted[3:4])) // 9  # of one episode; each is adapted to, and its row counts that alone
    assert float(by_name.loc["a + self-train (transductive)", "gradient steps"]) == pytest.approx(7 * queries, rel=0.01)


def test_views_and_notes_of_adaptation(adapted):
    frame = load(adapted)
    part = table.wide(frame)
    views = dict(table.views(part))
    assert list(views)[:4] == ["Methods", "Adaptation", "Groups", "J and F of the groups"]
    shown = views["Adaptation"]
    assert shown["method"].tolist()[:6] == part["method"].tolist()[:6]
    assert {"gain", "adapt, s/episode", "gradient steps", "trained, M", "peak memory, MiB"} < set(shown.columns)
    assert list(views["Methods"].columns) == list(table.views(table.wide(load(adapted[:1])))[0][1].columns)
    notes = " ".join(table.remarks(part))
    assert "a + maml: its weights are meta-learned: the gain is of these and of the adaptation together." in notes
    assert "b + finetune: the run without adaptation has other weights." in notes
    assert "c + maml" in notes
    assert "the run without adaptation is not among these" in notes
    same = [folder for folder in adapted if folder.parent.name in ("c-maml",)]
    plainly = write_run(same[0].parent / "c", make_manifest("1"), noisy("d"), "c", checkpoint_sha256=SHA)
    said = table.remarks(table.wide(load([same[0], plainly])))
    assert any(
        "c + maml: its weights are those of the run without adaptation, not meta-learned" in line for line in said
    )
    assert "gain" in table.leaderboard(adapted)


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    return {path.name: path.read_text() for path in table.write_tables(folders, out)}


def markdown_cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def latex_cells(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip().endswith("\\\\")]
    plain = [re.sub(r"\\([&%_])", r"\1", line[:-2].replace("\\&", "\0")).replace("\0", "AND") for line in lines]
    plain = [re.sub(r"\\ensuremath\{<\}|\$<\$", "<", line) for line in plain]
    return [[cell.strip().replace("AND", "&") for cell in line.split(" & ")] for line in plain]


def test_markdown_latex_and_csv_hold_the_same_cells(written):
    rows = list(csv.DictReader(written["leaderboard.csv"].splitlines()))
    expected = []
    for scoring in ("cma-paper", "davis"):
        part = pd.DataFrame([row for row in rows if row["scoring"] == scoring])
        for _, view in table.views(part):
            expected += [list(view.columns), *view.to_numpy().tolist()]
    results = written["leaderboard.md"].split("## Runs")[0]
    assert len(expected) == 2 * (1 + 3 + 2 * (1 + 4) + 1 + 1 + 1 + 4 + 1 + 4)
    assert markdown_cells(results) == expected
    assert latex_cells(written["leaderboard.tex"]) == expected


def test_numbers_are_those_of_the_summary(folders, written):
    shown = pd.read_csv(pd.io.common.StringIO(written["leaderboard.csv"]), dtype=str, keep_default_na=False)
    full = pd.read_csv(pd.io.common.StringIO(written["summary.csv"]), dtype={"group": str})
    calculated = summary(load(folders))
    assert full["jf"].tolist() == pytest.approx(calculated["jf"].tolist(), abs=1e-15)
    for line in shown.to_dict("records"):
        entry = line["method"].removesuffix(" (sees truth)")
        mine = full[(full["scoring"] == line["scoring"]) & (full["entry"] == entry)].set_index("group")
        for name, key in (("J", "j"), ("F", "f"), ("J&F", "jf")):
            for place, group in ((name, "mean"), (f"{name} 1", "1"), (f"{name} 2", "2")):
                assert float(line[place]) == pytest.approx(100 * mine.loc[group, key], abs=0.05 + 1e-9)
        low, high = re.fullmatch(r"\[(.*), (.*)\]", line["95 % interval"]).groups()
        assert (float(low), float(high)) == pytest.approx((100 * mine.loc["mean", ["low", "high"]]).tolist(), abs=0.051)
        assert line["queries"] == str(mine.loc["mean", "queries"])
        assert line["adapt, s/episode"] == "20"
        assert (line["peak memory, MiB"], line["parameters, M"]) == ("3", "1.50")


def test_marks_ranks_and_kinds(folders):
    part = table.wide(load(folders, "davis")).set_index("method")
    assert part["kind"].to_dict() == {
        "a": "method",
        "b": "method",
        "oracle (sees truth)": "truth",
        "a [text empty]": "ablation",
    }
    assert part["rank"].tolist() == ["1", "2", "-", "-"]
    assert part["against"].tolist() == ["-", "a", "-", "a"]
    for entry in ("b", "a [text empty]"):
        less = float(part.loc["a", "J&F"]) - float(part.loc[entry, "J&F"])
        assert float(part.loc[entry, "less by"]) == pytest.approx(less, abs=0.11)
    assert part.loc["oracle (sees truth)", "J&F"] == "100.0"
    titles = [title for title, _ in table.views(part.reset_index())]
    assert titles == [
        "Methods",
        "Groups",
        "J and F of the groups",
        "Ablations",
        "J&F averaged in other ways",
        "Counts and costs",
    ]


def test_leaderboard_names_its_sources_and_keeps_published_numbers_apart(folders, written, tmp_path):
    text = written["leaderboard.md"]
    assert text == table.leaderboard(folders[::-1])
    assert "Generated by `run_benchmark.py table`" in text
    measured, others = text.split("## Published numbers")
    assert "53.1" not in measured
    assert "Cross-Modal Affinity" not in measured
    cells = {tuple(row[:5]) for row in markdown_cells(others)}
    assert ("CMA", "Mini-Ref-YouTube-VOS", "mean over the four groups", "53.1", "54.8") in cells
    assert all("as stated by the paper" in row[-1] for row in markdown_cells(others)[1:])
    runs = markdown_cells(measured.split("## Runs")[1])
    assert [row[1] for row in runs[1:]] == [f"run{number}/{group}" for number in range(4) for group in (1, 2)]
    frame = load(folders)
    for row in runs[1:]:
        rows = frame[frame["folder"] == row[1]]
        assert row[0] == rows["run"].iloc[0]
        assert row[6] == rows["manifest"].iloc[0][:12]
        assert row[7] == (SHA[:12] if row[2].startswith("a") else "-")
        assert row[8] == "1, git abc0abc0abc0"
    assert str(folders[0].parents[1]) not in text
    assert "9 categories" not in text


def test_tables_do_not_depend_on_folder_order_or_hash_seed(folders, written, tmp_path):
    code = "import sys; from pathlib import Path; from fewref.benchmark.table import write_tables as w; "
    code += "w([Path(p) for p in sys.argv[2:]], Path(sys.argv[1]))"
    arguments = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code, str(tmp_path / "o")]
    environment = {"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([*arguments, *map(str, folders[::-1])], check=True, env=environment)
    assert {path.name: path.read_text() for path in (tmp_path / "o").iterdir()} == written


def test_unfinished_and_missing_groups_are_marked_or_refused(tmp_path):
    first, second = make_manifest("1", draws=1), make_manifest("2", draws=1)
    folders = [write_run(tmp_path / f"a{m.group}", m, noisy("a"), "a") for m in (first, second)]
    folders.append(write_run(tmp_path / "half", first, noisy("b"), "half"))
    begun = write_run(tmp_path / "begun", first, noisy("c"), "begun", keep=7)
    with pytest.raises(InputError, match="begun: unfinished, 20 of 27"):
        table.leaderboard([*folders, begun])
    with pytest.raises(InputError, match="begun: unfinished"):
        table.write_tables([*folders, begun], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    text = table.leaderboard([*folders, begun], partial=True)
    rows = {row[1]: row for row in markdown_cells(text.split("## Runs")[0]) if len(row) == 11}
    assert (rows["a"][0], rows["half"][0], rows["begun *"][0]) == ("1", "-", "-")
    assert "half: lacks group 2, its mean is over the others." in text
    assert "begun *: unfinished, 20 of 27 queries are missing" in text


def test_comparison_text(folders):
    text = table.comparison([folders[0], folders[4]], [folders[1], folders[5]], "davis")
    assert "A: a (run0/1, run0/2)\nB: b (run1/1, run1/2)" in text
    rows = markdown_cells(text)
    assert [row[0] for row in rows] == ["group", "1", "2", "mean"]
    for row in rows[1:]:
        assert float(row[3]) == pytest.approx(float(row[1]) - float(row[2]), abs=0.11)
    assert table.comparison(folders[0], folders[1]).count("J&F of A") == 2  # both protocols


def test_unwritable_output_is_one_clear_error(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        table.write_tables(folders[:1], tmp_path / "file" / "below")


def test_controls_through_the_runner(small, tmp_path):
    folders = []
    for method in (Oracle(), CopySupport(), Empty()):
        folders.append(tmp_path / method.info.name)
        options = {"manifest": small.manifest, "index": small.index, "workers": 0, "progress": False}
        run(method=method, method_name=method.info.name, out=folders[-1], scoring=["davis", "cma-paper"], **options)
    text = table.leaderboard(folders)
    assert "24 answers were resized to the scored size" in text.split("scoring: davis")[0]
    assert "resized" not in text.split("scoring: davis")[1]
    rows = [row for row in markdown_cells(text) if len(row) == 11 and row[1] != "method" and row[0] != ""]
    assert [row[1] for row in rows if row[0] in "12-"][:3] == ["copy-support", "empty", "oracle (sees truth)"]
    assert "Manifest " in text  # categories that the small set lacks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "<0.001"), (0.0123456, "0.0123"), (1234.5, "1230"), (12.0, "12"), (float("nan"), "-")],
)
def test_seconds(value, text):
    assert table.seconds(value) == text
