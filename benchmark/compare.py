"""Paired comparisons on the same queries: two entries, each with the best one, ablations and adaptations with origins.

The difference of J&F is averaged and resampled as J&F is (see `aggregate`). p is two-sided: twice the smaller share of
resamples on either side of 0, each share counting the observation itself; it cannot fall below 2 / (resamples + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fewref.benchmark.aggregate import (
    LEVELS,
    MEAN,
    RESAMPLES,
    average_of,
    by_group,
    entries,
    point,
    resampled,
)
from fewref.benchmark.results import KEY, SECTION, SETTINGS, check_same_questions, load, run_names
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import META

LEVEL = 0.05
OTHER_WEIGHTS = "has other weights"
NO_DIFFERENCE = dict.fromkeys(("difference", "low", "high", "p", "p_holm"), np.nan)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: adjusted p values, float64 (n,), in the order given.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    values = np.asarray(p_values, float)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def two_sided(differences: np.ndarray) -> float:
    """The bootstrap p value of "no difference" from resampled differences (n,)."""
    n = len(differences)
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (n + 1))


def paired(a: pd.DataFrame, b: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """The difference a - b of J&F, of two entries' rows under one scoring protocol: a line per group and the mean.

    Columns: group, a, b, difference, low, high (95 % bootstrap interval), p. Rows are matched by group, category, draw,
    episode and query. Raises InputError naming both where they were not asked the same.
    """
    unit, slot = average_of(a)
    both = _matched(a, b)
    rows = both.assign(j=both["j"] - both["j_b"], f=both["f"] - both["f_b"])
    lines, drawn = [], []
    for group, part in by_group(rows).items():
        drawn.append(resampled(part, unit, slot, resamples))
        values = [_value(entry[entry["group"] == group], unit, slot) for entry in (a, b)]
        lines.append({"group": group, "a": values[0], "b": values[1], "difference": _value(part, unit, slot)})
    means = {name: float(np.mean([line[name] for line in lines])) for name in ("a", "b", "difference")}
    lines.append({"group": MEAN, **means})
    drawn.append(np.mean(drawn, axis=0))
    ends = [dict(zip(("low", "high"), np.percentile(values, LEVELS), strict=True)) for values in drawn]
    return pd.DataFrame(lines).join(pd.DataFrame(ends)).assign(p=[two_sided(values) for values in drawn])


def _value(rows: pd.DataFrame, unit: str, slot: str) -> float:
    return float(point(rows, unit, slot).mean().mean())


def _matched(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The rows of `a` with `j_b` and `f_b`. Raises InputError unless both hold the same queries, scored alike."""
    names = [", ".join(rows["folder"].unique()) for rows in (a, b)]
    for column, called in zip(SECTION, ("dataset", "episode protocol", "scoring protocol"), strict=True):
        x, y = a[column].iloc[0], b[column].iloc[0]
        if x != y:
            raise InputError(f"{names[0]} and {names[1]}: {called} {x!r} against {y!r}; compare runs that share it")
    groups = [sorted(rows["group"].unique()) for rows in (a, b)]
    if groups[0] != groups[1]:
        x, y = (" ".join(map(str, group)) for group in groups)
        raise InputError(f"{names[0]} and {names[1]}: groups {x} against {y}; name the same groups on both sides")
    runs = pd.concat([a, b]).drop_duplicates(["folder", "manifest"])
    check_same_questions(runs)
    both = a.merge(b[[*KEY, "j", "f"]], on=KEY, how="outer", suffixes=("", "_b"), indicator="side")
    alone = both[both["side"] != "both"]
    if len(alone):
        query = alone.iloc[0]
        raise InputError(
            f"{names[0]} and {names[1]}: {len(alone)} queries are in one only (first: {query['query']} of episode "
            f"{query['episode']}); finish both runs"
        )
    return both


def compare(
    folders_a: Sequence[Path | str] | Path | str,
    folders_b: Sequence[Path | str] | Path | str,
    scoring: str | None = None,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """A against B, each the run or the runs (one per group) of one method: `paired` for every common scoring protocol.

    Columns beside those of `paired`: dataset, episodes, scoring, entry_a, entry_b and p_holm, corrected over the groups
    (the mean is one question of its own). Raises InputError where a side holds several methods and as `paired` does.
    """
    listed = [_listed(folders) for folders in (folders_a, folders_b)]
    names = run_names([*listed[0], *listed[1]])
    a, b = (load(folders, scoring) for folders in listed)
    a = a.assign(folder=a["folder"].map(dict(zip(run_names(listed[0]), names[: len(listed[0])], strict=True))))
    b = b.assign(folder=b["folder"].map(dict(zip(run_names(listed[1]), names[len(listed[0]) :], strict=True))))
    common = [name for name in a["scoring"].unique() if name in set(b["scoring"])]
    if not common:
        known = (", ".join(side["scoring"].unique()) for side in (a, b))
        raise InputError(f"{names[0]} and {names[-1]}: scored by {' against '.join(known)}; use `score` on one of them")
    parts = []
    for name in common:
        x, y = (_only_entry(side[side["scoring"] == name]) for side in (a, b))
        lines = paired(x, y, resamples)
        lines["p_holm"] = [*holm(lines["p"].iloc[:-1]), lines["p"].iloc[-1]]
        same = {column: x[column].iloc[0] for column in SECTION}
        parts.append(lines.assign(**same, entry_a=_called(x), entry_b=_called(y)))
    return pd.concat(parts, ignore_index=True)


def _listed(folders: Sequence[Path | str] | Path | str) -> list[Path]:
    return [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]


def _only_entry(rows: pd.DataFrame) -> pd.DataFrame:
    several = rows.drop_duplicates([*SECTION, "entry"])
    if len(several) > 1:
        x, y = several.iloc[0], several.iloc[1]
        raise InputError(
            f"{x['folder']} and {y['folder']}: a side of a comparison is one method under one protocol, but these are "
            f"{x['entry']}, {x['dataset']}, and {y['entry']}, {y['dataset']}; name them on different sides"
        )
    return rows


def _called(rows: pd.DataFrame) -> str:
    return f"{rows['entry'].iloc[0]} ({', '.join(rows['folder'].unique())})"


def ranks(frame: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """The order of the entries of each section by mean J&F, ties sharing a rank: 1, 1, 3.

    The best entry takes the rank, and with it all whose paired difference from it has a Holm-corrected p above 0.05
    (family: every entry not ranked yet); then the best of the rest, and so on. Ranked is what is finished, is no
    ablation, does not see the truth and has all groups that the section's entries have.
    Columns: dataset, episodes, scoring, entry, rank, best (entry) and, against the best, difference (best - entry),
    low, high, p, p_holm.
    """
    lines = []
    for section, part in frame.groupby(SECTION, sort=True):
        groups = part["group"].nunique()
        left = {entry: rows for _, entry, rows in entries(part) if _takes_part(rows, groups)}
        means = {entry: _mean(rows) for entry, rows in left.items()}
        order = sorted(left, key=lambda entry: (-means[entry], entry))
        best, rank, ranked = order[0] if order else "", {}, 0
        against: dict[str, dict] = {}
        while order:
            leader, others = order[0], order[1:]
            found = [_overall(left[leader], left[entry], resamples) for entry in others]
            adjusted = holm([line["p"] for line in found])
            tied = [leader, *(entry for entry, p in zip(others, adjusted, strict=True) if p > LEVEL)]
            if leader == best:
                against = {e: line | {"p_holm": p} for e, line, p in zip(others, found, adjusted, strict=True)}
            rank |= dict.fromkeys(tied, ranked + 1)
            ranked += len(tied)
            order = [entry for entry in order if entry not in tied]
        same = dict(zip(SECTION, section, strict=True))
        for entry in sorted(rank, key=lambda entry: (rank[entry], -means[entry], entry)):
            lines.append(same | {"entry": entry, "rank": rank[entry], "best": best} | against.get(entry, NO_DIFFERENCE))
    return pd.DataFrame(lines, columns=[*SECTION, "entry", "rank", "best", *NO_DIFFERENCE])


def ablations(frame: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Every ablation against the same method with the right sentence and support: origin - ablation.

    Columns: dataset, episodes, scoring, entry, origin, difference, low, high, p, p_holm (family: the ablations of the
    section), note: why there is no difference, if so.
    """
    lines = []
    for section, part in frame.groupby(SECTION, sort=True):
        same = dict(zip(SECTION, section, strict=True))
        found = []
        for _, entry, rows in entries(part[part["ablation"] != ""]):
            origin = part[(part["base"] == rows["base"].iloc[0]) & (part["ablation"] == "")]
            note = _unlike(origin, rows, "the run with the right sentence and support")
            line = NO_DIFFERENCE if note else _overall(origin, rows, resamples)
            name = "" if origin.empty else origin["entry"].iloc[0]
            found.append(same | {"entry": entry, "origin": name} | line | {"note": note})
        known = [line for line in found if not line["note"]]
        for line, p in zip(known, holm([line["p"] for line in known]), strict=True):
            line["p_holm"] = p
        lines += found
    return pd.DataFrame(lines, columns=[*SECTION, "entry", "origin", *NO_DIFFERENCE, "note"])


def adaptations(frame: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Every adapted entry against the same method, settings and ablation without adaptation: adapted - zero-shot.

    Columns: dataset, episodes, scoring, entry, origin ("" for none), difference, low, high, p, p_holm (family: the
    adapted entries of the section), note: why there is no difference, or what else than the adaptation differs.
    """
    lines = []
    for section, part in frame.groupby(SECTION, sort=True):
        same, found = dict(zip(SECTION, section, strict=True)), []
        for _, entry, rows in entries(part[part["adaptation"] != "none"]):
            origin = _zero_shot(part, rows)
            fault = _unlike(origin, rows, "the run without adaptation")
            note = _meta_note(origin, rows) if rows["adaptation"].iloc[0] in META and not origin.empty else ""
            fault = "" if fault.endswith(OTHER_WEIGHTS) and note else fault
            line = NO_DIFFERENCE if fault else _overall(rows, origin, resamples)
            name = "" if origin.empty else origin["entry"].iloc[0]
            found.append(same | {"entry": entry, "origin": name} | line | {"note": fault or note})
        known = [line for line in found if not np.isnan(line["p"])]
        for line, p in zip(known, holm([line["p"] for line in known]), strict=True):
            line["p_holm"] = p
        lines += found
    return pd.DataFrame(lines, columns=[*SECTION, "entry", "origin", *NO_DIFFERENCE, "note"])


def _zero_shot(part: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the entry without adaptation that belongs to an adapted one's; of several the first, equal weights
    before others."""
    like = part[part["adaptation"] == "none"]
    for name in ("method", "ablation", *SETTINGS):
        like = like[like[name] == rows[name].iloc[0]]
    names = sorted(like["entry"].unique())
    names.sort(key=lambda name: _weights(like[like["entry"] == name]) != _weights(rows))
    return like[like["entry"] == names[0]] if names else like


def _meta_note(origin: pd.DataFrame, rows: pd.DataFrame) -> str:
    if _weights(origin) == _weights(rows):
        return "its weights are those of the run without adaptation, not meta-learned ones"
    return "its weights are meta-learned: the gain is of these and of the adaptation together"


def _weights(rows: pd.DataFrame) -> dict[str, str]:
    return dict(zip(rows["group"], rows["checkpoint"], strict=True))


def _unlike(origin: pd.DataFrame, rows: pd.DataFrame, called: str) -> str:
    """Why an entry cannot be held against its origin; "" where it can."""
    if origin.empty:
        return f"{called} is not among these"
    if _weights(origin).keys() != _weights(rows).keys():
        return f"{called} is of other groups"
    if not (is_finished(origin) and is_finished(rows)):
        return "one of the two is unfinished"
    return "" if _weights(origin) == _weights(rows) else f"{called} {OTHER_WEIGHTS}"


def is_finished(rows: pd.DataFrame) -> bool:
    """Whether the runs of one entry hold all that their manifests ask."""
    return int(rows.drop_duplicates("folder")["asked"].sum()) == len(rows)


def _takes_part(rows: pd.DataFrame, groups: int) -> bool:
    right = not rows["sees_truth"].iloc[0] and rows["ablation"].iloc[0] == ""
    return right and is_finished(rows) and rows["group"].nunique() == groups


def _mean(rows: pd.DataFrame) -> float:
    return float(np.mean([_value(part, *average_of(rows)) for part in by_group(rows).values()]))


def _overall(a: pd.DataFrame, b: pd.DataFrame, resamples: int) -> dict:
    return paired(a, b, resamples).iloc[-1][["difference", "low", "high", "p"]].to_dict()
