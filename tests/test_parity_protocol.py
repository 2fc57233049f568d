"""Upstream's lists and frame windows, reproduced from the golden annotation files: every group, every sample."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewref.episodes import upstream_lists as upstream
from fewref.episodes.readers import index_from_metadata, read_index, read_masks
from fewref.episodes.sampler import build_manifest, episode_protocol, window
from fewref.splits import base_categories, load_split

GOLDEN = Path(os.environ.get("FEWREF_GOLDEN_DIR", Path(__file__).parent / "golden")) / "protocol"
FILES = json.loads((GOLDEN / "cases.json").read_text())["files"]
YOUTUBE, SAIL = load_split("mini-ref-youtube-vos"), load_split("mini-ref-sail-vos")
GROUPS = sorted(YOUTUBE.groups)


def load(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def in_order(meta, expressions):
    """The same files with numeric order of objects and expressions and sorted videos."""

    def number(items):
        return {key: items[key] for key in sorted(items, key=int)}

    known = {v: {"objects": number(meta["videos"][v]["objects"])} for v in sorted(meta["videos"])}
    spoken = {v: {**expressions["videos"][v]} for v in sorted(known)}
    for item in spoken.values():
        item["expressions"] = number(item["expressions"])
    return {"videos": known}, {"videos": spoken}


class RecordedRule:
    """The rule by which the golden draws were made (cases.json): item (5 calls + 2) mod size of the sorted list."""

    def __init__(self):
        self.calls = 0

    def __call__(self, items):
        chosen = sorted(items)[(5 * self.calls + 2) % len(items)]
        self.calls += 1
        return chosen


@pytest.fixture(scope="module")
def expected():
    return load("expected.json")


@pytest.fixture(scope="module")
def records():
    return upstream.video_records(load("meta.json"), load("meta_expressions.json"), YOUTUBE.categories)


@pytest.fixture(scope="module")
def by_category(records):
    return upstream.category_videos(records, YOUTUBE.categories)


@pytest.fixture(scope="module")
def sail():
    records = upstream.video_records(load("sail_meta.json"), load("sail_meta_expressions.json"), SAIL.categories)
    return records, upstream.category_videos(records, SAIL.categories)


def test_every_file_of_the_cases_is_there():
    assert {path.name for path in GOLDEN.glob("*.json")} >= set(FILES)


def test_frame_windows():
    rows = load("frame_windows.json")["rows"]
    assert [window(count, wanted, drawn) for count, wanted, drawn, _ in rows] == [used for *_, used in rows]
    assert len(rows) > 0


def test_category_to_videos(by_category, expected):
    found = {str(number): videos for number, videos in by_category.items() if videos}
    assert found == {number: videos for number, videos in expected["category_to_videos"].items() if videos}


@pytest.mark.parametrize("group", GROUPS)
def test_classes_and_training_lists(group, by_category, expected):
    want = expected[group]
    train, test = upstream.group_classes(YOUTUBE.categories, int(group))
    assert train == want["train_class_list"]
    assert test == want["test_class_list"]
    assert [YOUTUBE.categories[name] for name in YOUTUBE.groups[group]] == test
    assert [YOUTUBE.categories[name] for name in base_categories(YOUTUBE, group)] == train
    assert {str(number): sorted(by_category[number]) for number in train} == want["train_videos"]
    per_class = want["train_length"] // len(train)
    assert per_class * len(train) == want["train_length"]
    for item, number in want["train_index_to_class"]:
        assert upstream.training_class(item, train, per_class) == number


@pytest.mark.parametrize("group", GROUPS)
def test_support_and_query_videos(group, by_category, expected):
    want = expected[group]
    supports = upstream.draw_supports(by_category, want["test_class_list"], 1, RecordedRule())
    assert {str(number): videos[0] for number, videos in supports.items()} == want["support_videos"]
    queries = upstream.query_videos(by_category, supports)
    assert {str(number): videos for number, videos in queries.items()} == want["query_videos"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_test_sample(group, records, by_category, expected):
    want = expected[group]
    supports = {int(number): [video] for number, video in want["support_videos"].items()}
    samples = upstream.asked_samples(records, upstream.query_videos(by_category, supports))
    assert len(samples) == want["test_length"] == len(want["test_samples"])
    rule = RecordedRule()
    for number, (sample, row) in enumerate(zip(samples, want["test_samples"], strict=True)):
        record, support = sample.record, supports[sample.class_id][0]
        shown = None
        if sample.begin_new:
            shown = upstream.caption(records, support, upstream.draw_clip(records, support, rule)[1])
        rule(range(len(record.frames)))  # the query's frame is drawn as well, though all its frames are taken
        found = {
            "index": number,
            "class_id": sample.class_id,
            "video": record.video,
            "exp_id": record.exp_id,
            "obj_id": record.obj_id,
            "begin_new": sample.begin_new,
            "frames": list(record.frames),
            "caption": upstream.caption(records, record.video, record.exp_id),
            "support_caption": shown,
            "label": upstream.label(records, record.video),
        }
        assert found == {key: value for key, value in row.items() if key != "mask_area"}


@pytest.mark.parametrize("group", GROUPS)
def test_mask_area_through_our_reader(group, expected, tmp_path):
    """Annotation files as cases.json describes them, in upstream's folders, are read to the recorded areas."""
    rows = expected[group]["test_samples"]
    write_dataset(tmp_path, "meta.json", "meta_expressions.json", {row["video"]: row["frames"] for row in rows})
    index = read_index("mini-ref-youtube-vos", tmp_path)
    for row in rows:
        masks = read_masks(index, row["video"], row["frames"], [str(row["obj_id"])])
        assert masks.sum() == row["mask_area"]


def write_dataset(root, meta, expressions, frames):
    """The YouTube tree with two 6-pixel objects in each frame of the given videos."""
    base = root / "data" / "mini-ref-youtube-vos"
    for path, name in (
        (base / "train/meta.json", meta),
        (base / "meta_expressions/train/meta_expressions.json", expressions),
    ):
        path.parent.mkdir(parents=True)
        path.write_text((GOLDEN / name).read_text(encoding="utf-8"), encoding="utf-8")
    (base / "train" / "JPEGImages").mkdir()
    image = Image.fromarray(two_objects(), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    for video, names in frames.items():
        folder = base / "train" / "Annotations" / video
        folder.mkdir(parents=True)
        for name in names:
            image.save(folder / f"{name}.png")


def two_objects():
    labels = np.zeros((6, 8), np.uint8)
    labels[1:3, 1:4] = 1
    labels[3:5, 4:7] = 2
    return labels


@pytest.mark.parametrize("group", GROUPS)
def test_cma_paper_episodes_ask_what_upstream_asks(group):
    """With the files in numeric order (as published) the sampler's `cma-paper` queries are upstream's test set."""
    meta, expressions = in_order(load("meta.json"), load("meta_expressions.json"))
    records = upstream.video_records(meta, expressions, YOUTUBE.categories)
    by_category = upstream.category_videos(records, YOUTUBE.categories)
    index = index_from_metadata("mini-ref-youtube-vos", meta, expressions, Path("nowhere"))
    manifest = build_manifest(index, YOUTUBE, group, episode_protocol("cma-paper"))
    supports = {YOUTUBE.categories[e.category]: [e.support.shots[0].clip.video] for e in manifest.episodes}
    samples = upstream.asked_samples(records, upstream.query_videos(by_category, supports))
    want = [(s.class_id, f"{s.record.video}:{s.record.exp_id}", str(s.record.obj_id), s.record.frames) for s in samples]
    found = [
        (YOUTUBE.categories[e.category], query.id, target.expression.objects[0], query.clip.frames)
        for e in manifest.episodes
        for query, target in zip(e.queries, e.targets, strict=True)
    ]
    assert found == want
    texts = [query.text for e in manifest.episodes for query in e.queries]
    assert texts == [upstream.caption(records, s.record.video, s.record.exp_id) for s in samples]
    alone = {name for name, number in YOUTUBE.categories.items() if len(by_category[number]) < 2}
    left_out = {note.split(":")[0] for note in manifest.notes}
    assert left_out == alone & set(YOUTUBE.groups[group])


@pytest.mark.parametrize("part", ["train", "train_per_class_iterations"])
def test_sail_training_lists(part, sail):
    want, (_, videos) = load("sail_expected.json"), sail
    classes, want = want["train"]["class_list"], want[part]
    assert classes == sorted(SAIL.categories.values())
    if "videos" in want:
        assert {str(number): sorted(found) for number, found in videos.items()} == want["videos"]
    supports = upstream.draw_supports(videos, classes, want["shots"], RecordedRule())
    assert {str(number): found for number, found in supports.items()} == want["support_videos"]
    items = upstream.finetuning_classes(classes, want["iterations"])
    assert items == want["index_to_class_before_shuffle"]
    assert len(items) == want["length"]


def test_sail_test_lists(sail):
    records, videos = sail
    want = load("sail_expected.json")["test"]
    supports = upstream.draw_supports(videos, sorted(videos), 1, RecordedRule())
    assert {str(number): found[0] for number, found in supports.items()} == want["support_videos"]
    queries = upstream.query_videos(videos, supports)
    assert {str(number): found for number, found in queries.items()} == want["query_videos"]
    samples = upstream.asked_samples(records, queries)
    assert [
        {
            "index": number,
            "class_id": sample.class_id,
            "video": sample.record.video,
            "exp_id": sample.record.exp_id,
            "obj_id": sample.record.obj_id,
        }
        for number, sample in enumerate(samples)
    ] == want["samples"]


def test_sail_mask_quirk():
    areas = load("sail_expected.json")["mask_quirk"]["area_per_frame_for_obj_id"]
    for obj_id, per_frame in areas.items():
        labels = np.stack([two_objects()] * len(per_frame))
        assert upstream.sail_target(labels, int(obj_id)).sum(axis=(1, 2)).tolist() == per_frame
