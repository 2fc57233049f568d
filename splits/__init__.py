"""The datasets by name: categories with upstream's ids, groups of novel categories, published counts.

Each `<dataset>.json` holds layout (folder layout: youtube, sail, davis, mevis), categories (names in the order of their
ids 1, 2, ...; or the name of the dataset whose list it shares; empty where no list is published), groups (their number,
0 for one group of all categories, "none" where all are for training) and counts (as published).
Sources: hengliusky/Few_shot_RVOS (ids, groups), RSCM-FS-RVOS (counts).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fewref.episodes.errors import InputError, near

DATASETS = (
    "builtin",
    "builtin-sail",
    "builtin-davis",
    "builtin-mevis",
    "builtin-pretrain",
    "mini-ref-youtube-vos",
    "mini-ref-sail-vos",
    "mini-davis",
    "mini-mevis",
)


@dataclass(frozen=True)
class Split:
    """What is fixed about a dataset before its files are read.

    categories: name -> upstream id (from 1), empty where no list is published (see `complete`). groups: group name ->
    its novel (test) categories in id order; {"all": every category} for datasets without groups, {"none": ()} for one
    that is for training only.
    counts: published numbers ("videos", "categories"), empty where none are known.
    """

    dataset: str
    layout: str
    categories: dict[str, int]
    groups: dict[str, tuple[str, ...]]
    counts: dict[str, int]


def load_split(dataset: str) -> Split:
    """The split of a dataset of `DATASETS`. Raises InputError, with near names, for any other."""
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}: {near(dataset, DATASETS)}")
    data = _read(dataset)
    names = data["categories"]
    if isinstance(names, str):
        names = _read(names)["categories"]
    categories = {name: number for number, name in enumerate(names, start=1)}
    return Split(dataset, data["layout"], categories, _groups(categories, data["groups"]), data["counts"])


def complete(split: Split, found: Iterable[str]) -> Split:
    """Fill in the categories found in a dataset's metadata (sorted, ids from 1) where none are published."""
    if split.categories:
        return split
    categories = {name: number for number, name in enumerate(sorted(set(found)), start=1)}
    return dataclasses.replace(split, categories=categories, groups=_groups(categories, 0))


def novel_categories(split: Split, group: str) -> tuple[str, ...]:
    """The novel (test) categories of a group in id order. Raises InputError for an unknown group."""
    if group not in split.groups:
        raise InputError(f"{split.dataset} has no group {group!r}: {near(group, split.groups)}")
    return split.groups[group]


def base_categories(split: Split, group: str) -> tuple[str, ...]:
    """The training categories of a group, in id order: all that are not novel in it; none for "all"."""
    novel = novel_categories(split, group)
    return tuple(name for name in split.categories if name not in novel)


def _groups(categories: dict[str, int], count: int | str) -> dict[str, tuple[str, ...]]:
    """Group g of `count` holds the categories with (id - 1) mod count = g - 1 (hengliusky/Few_shot_RVOS)."""
    if count == "none":
        return {"none": ()}
    if not count:
        return {"all": tuple(categories)}
    return {
        str(group + 1): tuple(name for name, number in categories.items() if (number - 1) % count == group)
        for group in range(count)
    }


def _read(dataset: str) -> dict:
    return json.loads((Path(__file__).parent / f"{dataset}.json").read_text(encoding="utf-8"))
