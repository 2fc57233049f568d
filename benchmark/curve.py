"""J&F against the number of shots or of adaptation steps: a plot (PNG and SVG) and its numbers (CSV).

A line is one entry of the tables. The runs of each number are loaded apart, so that the same entry has the same name.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

from fewref.benchmark.aggregate import MEAN, RESAMPLES, summary
from fewref.benchmark.results import describe_episodes, load, run_names
from fewref.benchmark.store import read_header
from fewref.episodes.errors import InputError, near, write_atomic
from fewref.episodes.types import canonical_json

BY = {"shots": "support clips per episode (shots)", "steps": "gradient steps of the adaptation"}
STEPLESS = ("none", "prototype")
HIDDEN = ["ablation", "settings", "identity", "takes_steps", "weights"]  # columns of the points, not of the CSV
PANEL = ["dataset", "protocol", "scoring"]
NUMBERS = ["j", "f", "jf", "low", "high", "spread", "groups", "draws", "queries", "failed", "seconds_adapt"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000", "#B8A900")
MARKERS, DASHES = "osD^v<>Ph*", ("-", "--", "-.", (0, (1, 1)))
ASIDE = 1.5  # points between the bars of two lines
WIDE = 8  # largest number over smallest, from which on the axis is logarithmic
SIZE, LEGEND, DPI, WRAP = (5.6, 4.2), 2.6, 150, 95  # inches of a panel, inches beside the last one, letters of a line
RC = {"svg.hashsalt": "fewref", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
BARS = "J&F in percent, mean over the groups; bars: 95 % bootstrap interval over the videos, all draws together."
CAPTIONS = {
    "shots": "Each number of shots has a manifest of its own, other supports and other queries: points of one line are "
    "not paired, points of one number are.",
    "steps": "All points of a panel are asked on the same manifests. The point at 0 is the same method without "
    "adaptation; a horizontal line is what takes no steps.",
}


def write_curve(
    folders: Sequence[Path | str], by: str, out: Path, scoring: str | None = None, partial: bool = False
) -> list[Path]:
    """Write curve-<by>.png, .svg and .csv to `out`; equal runs give equal bytes. Returns their paths.

    by: "shots" or "steps". scoring, partial: as `load`. What sees the truth is left out. Nothing is written before all
    is calculated. Raises InputError for another `by`, runs with one number alone, an entry whose groups or settings
    change from number to number, and as `load`.
    """
    if by not in BY:
        raise InputError(f"--curve {by!r} is unknown: {near(by, BY)}")
    points = curve_points(folders, by, scoring, partial)
    files = {"csv": points.drop(columns=HIDDEN).to_csv(index=False, lineterminator="\n")}
    with matplotlib.style.context("default"), matplotlib.rc_context(RC):
        figure = draw(points, by)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=DPI, metadata=metadata)
            files[kind] = data.getvalue()
    for kind, data in files.items():
        write_atomic(Path(out) / f"curve-{by}.{kind}", data)
    return [Path(out) / f"curve-{by}.{kind}" for kind in ("png", "svg", "csv")]


def curve_points(
    folders: Sequence[Path | str], by: str, scoring: str | None = None, partial: bool = False
) -> pd.DataFrame:
    """One line per panel, entry and number (column `by`), sorted. Raises InputError as `write_curve`.

    Columns: dataset, protocol (in words, without shots for "shots"), scoring, entry, method, adaptation, `by`, then
    `NUMBERS`, shares as in `summary`, then `HIDDEN`. identity: all settings but the number; weights: checkpoint of each
    group; takes_steps: whether the strategy does; what takes none has 0 as its number of steps.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise InputError("no run folder is named; give the folders that `run --out` wrote")
    run_names(folders)  # refuses one that is named twice
    runs = [_run(read_header(folder)["defines"], by) for folder in folders]
    numbers = sorted({run["number"] for run in runs if by == "shots" or run["takes_steps"]})
    if len(numbers) < 2:
        found = f"only {numbers[0]}" if numbers else "none"
        option = "--shots 1,5" if by == "shots" else "--adapt finetune --adapt-steps 5,20"
        raise InputError(f"--curve {by}: the runs have {found} as their number of {by}; `run {option}` makes several")
    parts = []
    for number in sorted({run["number"] for run in runs}):
        places = [place for place, run in enumerate(runs) if run["number"] == number]
        parts += _points([folders[place] for place in places], [runs[place] for place in places], by, scoring, partial)
    points = pd.DataFrame(parts).sort_values([*PANEL, "entry", by], ignore_index=True)
    for (*_, entry), line in points.groupby([*PANEL, "entry"]):
        for name, called in (("groups", "groups"), ("identity", "settings")):
            if line[name].nunique() > 1:
                a, b = (f"{line[name].iloc[place]} at {line[by].iloc[place]} {by}" for place in (0, -1))
                raise InputError(f"--curve {by}: {entry} has other {called} ({a}, {b}); give runs that agree in them")
    return points


def _run(defines: dict[str, Any], by: str) -> dict[str, Any]:
    """What the curve must know of a run beside its table entry."""
    adaptation, protocol = dict(defines.get("adaptation") or {}), dict(defines["episodes"])
    takes_steps = adaptation.get("strategy", "none") not in STEPLESS
    number = protocol.pop("shots") if by == "shots" else 0
    if by == "steps" and takes_steps:
        number = adaptation.pop("steps")
    settings = {name: defines[name] for name in ("config", "precision", "window", "seed", "extras")}
    return {
        "number": number,
        "takes_steps": takes_steps,
        "protocol": describe_episodes(protocol),
        "identity": canonical_json([settings, adaptation]),
        "settings": canonical_json(settings),
    }


def _points(
    folders: list[Path], runs: list[dict[str, Any]], by: str, scoring: str | None, partial: bool
) -> list[dict[str, Any]]:
    """The points of one number."""
    frame = load(folders, scoring, partial)
    frame = frame[~frame["sees_truth"].astype(bool)]
    known = dict(zip(run_names(folders), runs, strict=True))
    found = []
    whole = summary(frame, RESAMPLES)
    for line in whole[whole["group"] == MEAN].to_dict("records"):
        rows = frame[(frame["entry"] == line["entry"]) & (frame["scoring"] == line["scoring"])]
        rows = rows[(rows["dataset"] == line["dataset"]) & (rows["episodes"] == line["episodes"])]
        run = known[rows["folder"].iloc[0]]
        line |= {name: run[name] for name in ("protocol", "settings", "identity", "takes_steps")} | {by: run["number"]}
        line["entry"] += (" (transductive)" if line["transductive"] else "") + (" *" if line["missing"] else "")
        line["groups"] = " ".join(sorted(rows["group"].unique()))
        line["weights"] = canonical_json(sorted(set(rows["group"] + " " + rows["checkpoint"])))
        names = [*PANEL, "entry", "method", "adaptation", by, *NUMBERS, *HIDDEN]
        found.append({name: line[name] for name in names})
    return found


def draw(points: pd.DataFrame, by: str) -> Figure:
    """The figure of `curve_points`: a panel for each dataset, protocol and scoring, a line for each entry."""
    panels = list(points.groupby(PANEL, sort=True))
    looks = {"color": ("method", COLOURS), "marker": ("entry", MARKERS), "linestyle": ("adaptation", DASHES)}
    values = {name: sorted(points[name].unique()) for name, _ in looks.values()}
    width = len(panels) * SIZE[0] + LEGEND
    figure = Figure(figsize=(width, SIZE[1] + 0.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (names, panel) in zip(axes, panels, strict=True):
        place.set_title("\n".join([f"{names[0]}, scoring: {names[2]}", *textwrap.wrap(names[1], 80)]), fontsize=8.5)
        lines = lines_of(panel, by)
        for number, (entry, line) in enumerate(lines):
            first = line.iloc[-1]  # the point at 0 is of another entry
            style = {key: kinds[values[name].index(first[name]) % len(kinds)] for key, (name, kinds) in looks.items()}
            _draw_line(place, entry, line, by, style, ASIDE * (number - (len(lines) - 1) / 2))
        _set_axes(place, panel, by)
    shown = [place.get_legend_handles_labels() for place in axes]
    legend = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
    highest = points.groupby("entry")["jf"].max()
    labels = sorted(legend, key=lambda label: (-highest[label], label))
    side = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "frameon": False}
    axes[-1].legend([legend[label] for label in labels], labels, **side)
    said = textwrap.wrap(f"{BARS} {CAPTIONS[by]}", round(width * WRAP / SIZE[0] * 0.85))
    figure.supxlabel("\n".join(said), fontsize=8, color="#555555", x=0.01, horizontalalignment="left")
    return figure


def lines_of(panel: pd.DataFrame, by: str) -> list[tuple[str, pd.DataFrame]]:
    """(entry, its points), sorted; by steps, a line begins at 0 with the same method, unadapted, and the same weights.

    An entry that only begins lines of others has no line of its own.
    """
    lines = dict(iter(panel.groupby("entry", sort=True)))
    begun = set()
    for entry, line in lines.items() if by == "steps" else ():
        first, start = line.iloc[0], panel[(panel["adaptation"] == "none")]
        for name in ("method", "ablation", "settings", "weights"):
            start = start[start[name] == first[name]]
        if first["takes_steps"] and len(start):
            begun.add(start["entry"].iloc[0])
            lines[entry] = pd.concat([start.iloc[:1], line])
    return [(entry, line) for entry, line in lines.items() if entry not in begun]


def _draw_line(axes: Axes, entry: str, line: pd.DataFrame, by: str, style: dict[str, Any], aside: float) -> None:
    """One entry, set aside by some points, so that bars at the same number do not hide each other."""
    values = 100 * line[["jf", "low", "high"]].to_numpy(float)
    bars = np.abs(values[:, 1:] - values[:, :1]).T
    if by == "steps" and not line["takes_steps"].any():
        axes.axhline(values[0, 0], linestyle=(0, (1, 3)), linewidth=1.2, color=style["color"], label=entry)
        return
    shift = ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    options = {"capsize": 2, "linewidth": 1.6, "elinewidth": 0.9, "markersize": 5, "label": entry}
    axes.errorbar(line[by], values[:, 0], yerr=bars, transform=axes.transData + shift, **options, **style)


def _set_axes(axes: Axes, panel: pd.DataFrame, by: str) -> None:
    """Scales and limits; the lines are drawn aside of their numbers, so that matplotlib cannot find these itself."""
    numbers = sorted(panel[by].unique())
    positive = [number for number in numbers if number > 0]
    if positive[-1] / positive[0] >= WIDE:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    left, right = axes.transScale.transform([(numbers[0], 0), (numbers[-1], 0)])[:, 0]
    ends = [(left - 0.07 * (right - left), 0), (right + 0.07 * (right - left), 0)]
    axes.set_xlim(*axes.transScale.inverted().transform(ends)[:, 0])
    low, high = 100 * panel["low"].min(), 100 * panel["high"].max()
    space = max(0.06 * (high - low), 0.5)
    axes.set_ylim(low - space, high + space)
    axes.set_xlabel(BY[by])
    axes.set_ylabel("J&F (%)")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
