"""A dataframe of queries becomes means, intervals and spreads per group and over groups.

Order of averages, within one support draw: frames, queries, categories (or all frames at once, where the scoring
protocol says so); then draws, then groups. A failed query counts as J = F = 0.
The interval resamples videos inside every category, all draws and sentences of a video together; a video that is asked
about in two categories is two clusters. It says nothing of the choice of supports, which the spread does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fewref.benchmark.results import KEY, SECTION
from fewref.benchmark.scoring import get_scoring
from fewref.episodes.draws import generator

MEAN = "mean"
RESAMPLES = 2000
LEVELS = (2.5, 97.5)
FEW_VIDEOS = 5
DECIMALS = 12  # the last digits of a matrix product depend on the processor; no table, tie or p value may
# `ScoringProtocol.average` -> (what weighs the same, within what it is averaged first)
AVERAGES = {"query": ("query", "category"), "frame": ("frame", "group"), "danet": ("frame", "category")}
SAME = ("base", "ablation", "method", "adaptation", "transductive", "text", "support", "sees_truth")  # in an entry
OTHER_AVERAGES = (("query", "category"), ("query", "group"), ("frame", "category"), ("frame", "group"))


@dataclass(frozen=True)
class Sums:
    """J and F of one entry in one group, summed up as far as no resampling can tell.

    clusters: n sorted (category, video). totals: float64 (n, D, 2), sums of J and of F over the queries or frames of a
    cluster in each of D draws; counts: (n, D), how many. slots: ranges of clusters that are averaged first.
    """

    clusters: tuple[tuple[str, str], ...]
    draws: tuple[int, ...]
    totals: np.ndarray
    counts: np.ndarray
    slots: tuple[slice, ...]


def sums_of(rows: pd.DataFrame, unit: str, slot: str) -> Sums:
    """The sums of one entry's rows in one group; any order of rows gives the same.

    unit: "query" or "frame", what weighs the same. slot: "category" or "group", within what it is averaged first.
    """
    rows = rows.sort_values([*KEY, "video"])
    keys = list(zip(rows["category"], rows["video"], strict=True))
    clusters, draws = sorted(set(keys)), sorted(set(rows["seed"]))
    number = {key: place for place, key in enumerate(clusters)}
    place = np.array([number[key] for key in keys]), np.searchsorted(draws, rows["seed"])
    size = rows["frames"].to_numpy(float) if unit == "frame" else np.ones(len(rows))
    totals, counts = np.zeros((len(clusters), len(draws), 2)), np.zeros((len(clusters), len(draws)))
    np.add.at(totals, place, rows[["j", "f"]].to_numpy(float) * size[:, None])
    np.add.at(counts, place, size)
    firsts = [n for n, key in enumerate(clusters) if slot == "category" and n and key[0] != clusters[n - 1][0]]
    edges = [0, *firsts, len(clusters)]
    slots = tuple(slice(a, b) for a, b in zip(edges, edges[1:], strict=False))
    return Sums(tuple(clusters), tuple(int(draw) for draw in draws), totals, counts, slots)


def draw_means(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """J and F of each draw under how often each cluster was drawn: weights (R, n) -> float64 (R, D, 2).

    A slot that a resample leaves without any query in a draw is left out of that draw's mean; NaN where all are.
    Rounded to 12 decimals.
    """
    repeats, (clusters, draws) = len(weights), sums.counts.shape
    flat = sums.totals.reshape(clusters, -1)
    total, seen = np.zeros((repeats, draws, 2)), np.zeros((repeats, draws, 1))
    for part in sums.slots:
        count = (weights[:, part] @ sums.counts[part])[..., None]
        value = (weights[:, part] @ flat[part]).reshape(repeats, draws, 2)
        total += np.divide(value, count, out=np.zeros_like(value), where=count > 0)
        seen += count > 0
    means = np.divide(total, seen, out=np.full_like(total, np.nan), where=seen > 0)
    return np.round(means, DECIMALS)


def resample_weights(dataset: str, group: str, clusters: Sequence[tuple[str, str]], resamples: int) -> np.ndarray:
    """How often each cluster is drawn in each resample, float64 (resamples, n): per category as many videos as it has.

    Every category has a generator of its own, keyed by dataset, group and category: all methods share the draws.
    """
    parts = []
    for category in sorted({category for category, _ in clusters}):
        n = sum(key[0] == category for key in clusters)
        drawn = generator("bootstrap", dataset, group, category).integers(n, size=(resamples, n))
        flat = (drawn + n * np.arange(resamples)[:, None]).ravel()
        parts.append(np.bincount(flat, minlength=resamples * n).reshape(resamples, n))
    return np.concatenate(parts, axis=1).astype(float)


def point(rows: pd.DataFrame, unit: str, slot: str) -> pd.DataFrame:
    """J and F (columns) of each draw (index) of one entry in one group."""
    sums = sums_of(rows, unit, slot)
    means = draw_means(sums, np.ones((1, len(sums.clusters))))[0]
    return pd.DataFrame(means, index=list(sums.draws), columns=["j", "f"])


def resampled(rows: pd.DataFrame, unit: str, slot: str, resamples: int = RESAMPLES) -> np.ndarray:
    """J&F of one entry in one group, mean over draws, in every resample of its videos: float64 (resamples,)."""
    sums = sums_of(rows, unit, slot)
    weights = resample_weights(rows["dataset"].iloc[0], rows["group"].iloc[0], sums.clusters, resamples)
    return np.nanmean(draw_means(sums, weights), axis=1).mean(axis=1)


def average_of(rows: pd.DataFrame) -> tuple[str, str]:
    """(unit, slot) of the rows' scoring protocol."""
    return AVERAGES[get_scoring(rows["scoring"].iloc[0]).average]


def by_group(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each group, groups sorted."""
    return {str(group): part for group, part in rows.groupby("group", sort=True)}


def entries(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], str, pd.DataFrame]]:
    """((dataset, episodes, scoring), entry, its rows), sorted."""
    for (*section, entry), rows in frame.groupby([*SECTION, "entry"], sort=True):
        yield tuple(section), entry, rows


def summary(frame: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """One line per section, entry and group, and one for the mean over groups (`group` = "mean").

    j, f, jf: in [0,1]. low, high: 95 % bootstrap interval of jf. spread: standard deviation (n - 1) of jf over draws,
    NaN for one draw. iou: summed intersection over union. jf_<unit>_<slot>: jf averaged in other ways. Counts.
    seconds_adapt, adapt_steps: seconds and gradient steps of adapting, mean over the episodes that did not fail, those
    of all queries together where each is adapted to; seconds_predict: per query. adapt_trained: most weights changed;
    most peak_bytes; `notes`, one line.
    """
    lines = []
    for section, entry, rows in entries(frame):
        first = rows.iloc[0]
        same = dict(zip(SECTION, section, strict=True)) | {"entry": entry}
        same |= {name: first[name] for name in SAME}
        lines += [same | line for line in _entry_lines(rows, resamples)]
    return pd.DataFrame(lines)


def _entry_lines(rows: pd.DataFrame, resamples: int) -> list[dict[str, Any]]:
    unit, slot = average_of(rows)
    parts = by_group(rows)
    points = {group: point(part, unit, slot) for group, part in parts.items()}
    drawn = {group: resampled(part, unit, slot, resamples) for group, part in parts.items()}
    others = {group: _other_averages(part) for group, part in parts.items()}
    parts[MEAN], drawn[MEAN] = rows, np.mean(list(drawn.values()), axis=0)
    points[MEAN] = sum(points.values()) / len(points)  # a draw that some group lacks becomes NaN
    lines = []
    for group, part in parts.items():
        mean = points[group].mean() if group != MEAN else np.mean([points[g].mean() for g in others], axis=0)
        more = others[group] if group != MEAN else pd.DataFrame(list(others.values())).mean().to_dict()
        low, high = np.percentile(drawn[group], LEVELS)
        j, f = (float(value) for value in np.asarray(mean))
        spread = float(points[group].mean(axis=1, skipna=False).std(ddof=1))
        line = {"group": group, "j": j, "f": f, "jf": (j + f) / 2, "low": low, "high": high, "spread": spread}
        lines.append(line | more | _counts(part))
    return lines


def _other_averages(rows: pd.DataFrame) -> dict[str, float]:
    """jf of one group by every unit and slot, and the overall IoU (NaN with failed queries, 1 without foreground)."""
    jf = {f"jf_{unit}_{slot}": float(point(rows, unit, slot).mean().mean()) for unit, slot in OTHER_AVERAGES}
    union = rows["union"].sum(skipna=False)
    return jf | {"iou": rows["inter"].sum(skipna=False) / union if union != 0 else 1.0}


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    """How much was asked, what it cost, and what a reader must know of it."""
    good = rows[rows["status"] == "ok"]
    spent = ["seconds_adapt", "adapt_steps"]
    by_episode = good.groupby(["folder", "episode"])[spent]
    adapted = by_episode.sum() if bool(rows["transductive"].iloc[0]) else by_episode.first()  # else rows repeat it
    missing = int(rows.drop_duplicates("folder")["asked"].sum()) - len(rows)
    return {
        "episodes_asked": rows["episode"].nunique(),
        "queries": len(rows),
        "missing": missing,
        "failed": len(rows) - len(good),
        "videos": rows["video"].nunique(),
        "frames": int(rows["frames"].sum()),
        "draws": rows["seed"].nunique(),
        "seconds_adapt": float(adapted["seconds_adapt"].mean()),
        "adapt_steps": float(adapted["adapt_steps"].mean()),
        "adapt_trained": int(rows["adapt_trained"].max()),
        "seconds_predict": float(good["seconds_predict"].mean()),
        "peak_bytes": int(rows["peak_bytes"].max()),
        "parameters": int(rows["parameters"].max()),
        "notes": "; ".join(_notes(rows, missing)),
    }


def _notes(rows: pd.DataFrame, missing: int) -> list[str]:
    said = []
    if missing:
        said.append(f"unfinished, {missing} of {len(rows) + missing} queries are missing")
    if failed := int((rows["status"] != "ok").sum()):
        said.append(f"{failed} of {len(rows)} queries failed and count as 0")
    videos = rows.groupby(["group", "category"])["video"].nunique()
    if few := int((videos < FEW_VIDEOS).sum()):
        said.append(
            f"{few} of {len(videos)} categories have fewer than {FEW_VIDEOS} query videos: intervals and p are too sure"
        )
    if halved := int((rows["window"] < rows["run_window"]).sum()):
        said.append(f"{halved} queries were asked in smaller windows after out-of-memory")
    if resized := int(rows["resized"].sum()):
        said.append(f"{resized} answers were resized to the scored size from the original size")
    return said
