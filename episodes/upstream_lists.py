"""The lists that the upstream dataset classes derive from the annotation files, faults included, for comparison.

Source: `specs/protocol.md` sections 1.3, 2 and 3.2-3.5 (hengliusky/Few_shot_RVOS). Everything follows the order of
the parsed files, as upstream does; the suite's own episodes come from `sampler`, which does not depend on that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewref.episodes.metadata import normalise

# Draws one item of a list; upstream's is random.sample(items, 1)[0].
Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Record:
    """One expression of a video. frames: sorted; category: upstream's id of this object's category."""

    video: str
    exp_id: int
    text: str
    obj_id: int
    frames: tuple[str, ...]
    category: int


@dataclass(frozen=True)
class Sample:
    """One test question. class_id: the class in whose queue it stands; begin_new: the support clip is loaded here."""

    class_id: int
    record: Record
    begin_new: bool


def video_records(meta: dict, expressions: dict, categories: Mapping[str, int]) -> dict[str, list[Record]]:
    """Video -> its records in file order; videos in the order of `meta` (both: parsed files with a table "videos").

    Videos without expressions get no entry (upstream gives them the category of the video before, or stops).
    """
    records = {}
    for video, known in meta["videos"].items():
        spoken = expressions["videos"][video]
        frames = tuple(sorted(spoken["frames"]))
        of = {number: categories[item["category"]] for number, item in known["objects"].items()}
        found = [
            Record(video, int(key), item["exp"], int(item["obj_id"]), frames, of[item["obj_id"]])
            for key, item in spoken["expressions"].items()
        ]
        if found:
            records[video] = found
    return records


def category_videos(records: Mapping[str, list[Record]], categories: Mapping[str, int]) -> dict[int, list[str]]:
    """Category id -> videos in file order; a video belongs to the category of its last record's object only."""
    videos: dict[int, list[str]] = {number: [] for number in categories.values()}
    for video, found in records.items():
        videos[found[-1].category].append(video)
    return videos


def group_classes(categories: Mapping[str, int], group: int, groups: int = 4) -> tuple[list[int], list[int]]:
    """(training, test) category ids of group 1..groups: those with (id - 1) mod groups = group - 1 are tested."""
    ids = sorted(categories.values())
    test = [number for number in ids if (number - 1) % groups == group - 1]
    return [number for number in ids if number not in test], test


def training_class(item: int, classes: Sequence[int], per_class: int = 100) -> int:
    """The class of training item 0..len(classes)*per_class-1; items are visited in this order."""
    return classes[item // per_class]


def finetuning_classes(classes: Sequence[int], iterations: Sequence[int]) -> list[int]:
    """The class of each item of SAIL-VOS fine-tuning, before the shuffle: iterations[c], or the only one, per class."""
    each = iterations if len(iterations) > 1 else [iterations[0]] * len(classes)
    return [number for number, count in zip(classes, each, strict=True) for _ in range(count)]


def draw_supports(
    videos: Mapping[int, list[str]], classes: Sequence[int], shots: int, pick: Pick
) -> dict[int, list[str]]:
    """Class -> `shots` support videos in drawing order, drawn one by one from what is left of its sorted list.

    Upstream's test set draws from an unsorted set, which depends on the interpreter's hash seed.
    Raises ValueError for a class with fewer videos.
    """
    supports = {}
    for number in classes:
        left = sorted(videos[number])
        if len(left) < shots:
            raise ValueError(f"category {number} has {len(left)} videos, {shots} are to be drawn")
        supports[number] = []
        for _ in range(shots):
            supports[number].append(pick(left))
            left.remove(supports[number][-1])
    return supports


def query_videos(videos: Mapping[int, list[str]], supports: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Class of `supports` -> its other videos, sorted."""
    return {number: sorted(set(videos[number]) - set(shown)) for number, shown in supports.items()}


def asked_samples(records: Mapping[str, list[Record]], queries: Mapping[int, Sequence[str]]) -> list[Sample]:
    """Per class, per query video, per record in file order, whatever the category of its object."""
    samples = []
    for number, videos in queries.items():
        asked = [record for video in videos for record in records[video]]
        samples += [Sample(number, record, position == 0) for position, record in enumerate(asked)]
    return samples


def caption(records: Mapping[str, list[Record]], video: str, exp_id: int) -> str:
    """The sentence upstream feeds: `exp_id` is taken as a POSITION in the video's records. Normalised.

    Raises IndexError where the ids have gaps.
    """
    return normalise(records[video][exp_id].text)


def label(records: Mapping[str, list[Record]], video: str) -> int:
    """The class label upstream gives every frame of a video: the category of its first record."""
    return records[video][0].category


def draw_clip(records: Mapping[str, list[Record]], video: str, pick: Pick) -> tuple[int, int, int]:
    """(object id, expression id, frame position) of a clip, drawn in this order (3.2, 3.1).

    Objects are drawn from the list of the records' objects, so that one with several expressions is likelier.
    """
    found = records[video]
    obj_id = pick([record.obj_id for record in found])
    exp_id = pick([record.exp_id for record in found if record.obj_id == obj_id])
    return obj_id, exp_id, pick(range(len(found[0].frames)))


def sail_target(labels: np.ndarray, obj_id: int) -> np.ndarray:
    """Upstream's SAIL-VOS mask, bool like `labels` (integers): ids above 1 become 1 first, then the id is compared.

    So object 1 means any object and every other one nothing; the suite's reader compares ids (section 4, fault 9).
    """
    return np.minimum(labels, 1) == obj_id
