"""J&F against shots and steps: the numbers are those of the tables, the files repeat, the lines are right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from handmade import make_manifest, noisy, per_draw, write_run
from PIL import Image

from fewref.benchmark.curve import curve_points, draw, lines_of, write_curve
from fewref.benchmark.provenance import plain
from fewref.benchmark.store import read_rows
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import AdaptOptions

GROUPS = ("1", "2")
SHA = "0123456789abcdef" * 4


def adapted(strategy: str, **changes) -> dict:
    return {"adaptation": plain(AdaptOptions(strategy, **changes)), "checkpoint_sha256": SHA}


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    """A method by itself, fine-tuned with three numbers of steps, with prototypes; a control and a bound."""
    root, found = tmp_path_factory.mktemp("steps"), []
    runs = {"m": ("m", 0.3, {"checkpoint_sha256": SHA}), "p": ("m", 0.35, adapted("prototype"))}
    runs |= {f"f{n}": ("m", 0.3 + n / 100, adapted("finetune", steps=n)) for n in (1, 5, 20)}
    runs |= {"c": ("c", 0.1, {}), "oracle": ("oracle", 0.9, {"sees_truth": True})}
    for name, (method, level, options) in runs.items():
        for group in GROUPS:
            manifest = make_manifest(group)
            found.append(write_run(root / name / group, manifest, noisy(name, level), method, **options))
    return found


def with_shots(group: str, shots: int):
    manifest = make_manifest(group, draws=2)
    return dataclasses.replace(manifest, protocol={**manifest.protocol, "shots": shots})


@pytest.fixture(scope="module")
def by_shots(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("shots"), []
    for shots in (1, 5):
        for name, options in (("a", {}), ("b", adapted("finetune"))):
            for group in GROUPS:
                folder = root / f"{name}-{shots}" / group
                scoring = ("davis", "cma-paper")
                manifest = with_shots(group, shots)
                found.append(write_run(folder, manifest, noisy(name, 0.4 + shots / 100), name, scoring, **options))
    return found


def test_points_by_steps_are_means_over_draws_and_groups(by_steps):
    points = curve_points(by_steps, "steps").set_index(["entry", "steps"])
    assert points.index.tolist() == [
        ("c", 0),
        ("m", 0),
        ("m + finetune", 1),
        ("m + finetune", 5),
        ("m + finetune", 20),
        ("m + prototype", 0),
    ]
    for (entry, steps), name in {("m", 0): "m", ("m + finetune", 5): "f5", ("m + prototype", 0): "p"}.items():
        folders = [folder for folder in by_steps if folder.parent.name == name]
        assert len(folders) == 2
        draws = [np.mean(list(per_draw(read_rows(folder), "davis").values()), axis=0) for folder in folders]
        line = points.loc[(entry, steps)]
        assert line[["j", "f"]].tolist() == pytest.approx(np.mean(draws, axis=0).tolist())
        assert line["low"] < line["jf"] < line["high"]
        assert (line["groups"], line["draws"], line["queries"]) == ("1 2", 3, 162)


def test_lines_by_steps_begin_with_the_unadapted_method(by_steps):
    panel = curve_points(by_steps, "steps")
    lines = dict(lines_of(panel, "steps"))
    assert list(lines) == ["c", "m + finetune", "m + prototype"]
    assert lines["m + finetune"]["steps"].tolist() == [0, 1, 5, 20]
    zero = panel[panel["entry"] == "m"]["jf"].iloc[0]
    assert lines["m + finetune"]["jf"].iloc[0] == zero
    other = panel.assign(weights=panel["weights"].where(panel["entry"] != "m", "other"))
    lines = dict(lines_of(other, "steps"))
    assert lines["m + finetune"]["steps"].tolist() == [1, 5, 20]
    assert "m" in lines


def test_points_by_shots_and_the_figure_that_calls_them_unpaired(by_shots):
    points = curve_points(by_shots, "shots")
    assert points["scoring"].unique().tolist() == ["cma-paper", "davis"]
    for _, line in points.groupby(["scoring", "entry"]):
        assert line["shots"].tolist() == [1, 5]
    assert points["protocol"].unique().tolist() == ["group (support frames 1, supports 2)"]
    figure = draw(points, "shots")
    assert "points of one line are not paired" in " ".join(figure.get_supxlabel().split())
    assert len(figure.axes) == 2
    for axes, scoring in zip(figure.axes, ("cma-paper", "davis"), strict=True):
        part = points[points["scoring"] == scoring]
        drawn = {bar.get_label(): bar.lines[0].get_xydata() for bar in axes.containers}
        assert set(drawn) == {"a", "b + finetune"}
        for entry, line in part.groupby("entry"):
            assert drawn[entry] == pytest.approx(np.column_stack([line["shots"], 100 * line["jf"]]))
        low, high = axes.get_ylim()
        assert low < 100 * part["low"].min() < 100 * part["high"].max() < high
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert labels == sorted(labels, key=lambda entry: -points[points["entry"] == entry]["jf"].max())


def test_files_repeat_byte_for_byte_in_any_order(by_steps, tmp_path):
    first = write_curve(by_steps, "steps", tmp_path / "a")
    again = write_curve(by_steps[::-1], "steps", tmp_path / "b")
    assert [path.name for path in first] == ["curve-steps.png", "curve-steps.svg", "curve-steps.csv"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert Image.open(first[0]).width > 800
    text = first[1].read_text()
    assert text.rstrip().endswith("</svg>")
    assert "dc:date" not in text
    written = pd.read_csv(first[2])
    points = curve_points(by_steps, "steps")
    assert written["jf"].tolist() == pytest.approx(points["jf"].tolist(), rel=1e-12)
    assert "oracle" not in first[2].read_text()
    assert {"weights", "identity"}.isdisjoint(written.columns)


def test_what_is_transductive_or_unfinished_is_marked(tmp_path):
    manifest, folders = make_manifest("1"), []
    for steps, keep in ((1, None), (5, 40)):
        options = {"keep": keep, **adapted("self-train", steps=steps)}
        folders.append(write_run(tmp_path / str(steps), manifest, noisy("s"), "m", **options))
    found = curve_points(folders, "steps", partial=True)
    assert found["entry"].tolist() == ["m + self-train (transductive)", "m + self-train (transductive) *"]


def test_refusals(by_steps, by_shots, tmp_path):
    def only(*names: str) -> list:
        return [folder for folder in by_steps if folder.parent.name in names]

    moved = write_run(tmp_path / "moved", make_manifest("1"), noisy("x"), "m", **adapted("finetune", steps=9, lr=0.5))
    cases = [
        (by_steps, "stesp", "--curve 'stesp' is unknown: did you mean 'steps'"),
        (by_steps, "shots", "only 1 as their number of shots; `run --shots 1,5` makes several"),
        (by_shots, "steps", "only 20 as their number of steps"),
        (only("m", "c", "p"), "steps", "none as their number of steps"),
        ([*only("f1"), only("f5")[0]], "steps", r"m \+ finetune has other groups \(1 2 at 1 steps, 1 at 5 steps\)"),
        ([only("f1")[0], moved], "steps", r"m \+ finetune has other settings"),
        ([*by_steps, by_steps[0]], "steps", "named twice"),
        ([], "steps", "no run folder is named"),
    ]
    for folders, by, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            write_curve(folders, by, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_curve(by_steps, "steps", tmp_path / "file" / "below")
