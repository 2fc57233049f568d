"""Each way to leak is planted into a fair manifest and must be found."""

import dataclasses
import json
from pathlib import Path

import pytest

from fewref.episodes.errors import InputError
from fewref.episodes.leakage import check, notes
from fewref.episodes.readers import index_from_metadata
from fewref.episodes.sampler import PROTOCOLS, build_manifest
from fewref.episodes.types import from_json, to_json
from fewref.splits import load_split

SPLIT = load_split("mini-ref-youtube-vos")
FRAMES = [f"{5 * k:05d}" for k in range(6)]


def metadata():
    """Eight videos of each category; every second one has an object of the next category with a sentence."""
    names = list(SPLIT.categories)
    meta, spoken = {}, {}
    for number, category in enumerate(names):
        for copy in range(8):
            other = names[(number + 1) % len(names)]
            objects = {"1": {"category": category, "frames": FRAMES}, "2": {"category": other, "frames": FRAMES}}
            said = {"0": {"exp": f"a {other}", "obj_id": "2"}} if copy % 2 else {}
            said["1"] = {"exp": f"a {category}", "obj_id": "1"}
            meta[f"{category}-{copy}"] = {"objects": objects}
            spoken[f"{category}-{copy}"] = {"frames": FRAMES, "expressions": said}
    return {"videos": meta}, {"videos": spoken}


@pytest.fixture(scope="module")
def index():
    return index_from_metadata("mini-ref-youtube-vos", *metadata(), Path("nowhere"))


@pytest.fixture(scope="module")
def fair(index):
    return build_manifest(index, SPLIT, "1", PROTOCOLS["group"])


def changed(manifest, number, edit):
    """The manifest with one episode's JSON edited; its hash is rightly made anew."""
    episodes = list(manifest.episodes)
    value = json.loads(json.dumps(to_json(episodes[number])))
    edit(value)
    episodes[number] = from_json(value)
    return dataclasses.replace(manifest, episodes=tuple(episodes))


def test_fair_manifests_have_no_problem(index, fair):
    assert check(fair, SPLIT) == []
    assert check(fair, SPLIT, index) == []


def test_mixed_videos_are_counted_not_refused(index, fair):
    """hat (1), raccoon (5), ... are novel in group 1: half of a category's eight videos also name the next category,
    and half of the eight videos before name it; each of these videos has one sentence of a base category."""
    tested = {c.video for e in fair.episodes for c in [s.clip for s in e.support.shots] + [q.clip for q in e.queries]}
    base = [x for v in tested for x in index.videos[v].expressions if x.category not in SPLIT.groups["1"]]
    assert len(base) == 12 * (4 + 4)
    assert [
        line for line in notes(fair, SPLIT, index) if line.startswith(f"{len(base)} expressions of base categories")
    ]


def test_upstream_assignment_asks_about_other_categories_and_says_so(index):
    protocol = PROTOCOLS["cma-paper"]
    made = build_manifest(index, SPLIT, "1", protocol)
    foreign = {t.query for e in made.episodes for t in e.targets if t.expression.category != e.category}
    assert foreign
    assert check(made, SPLIT, index) == []
    assert any(line.startswith(f"{len(foreign)} queries are about objects of another") for line in notes(made, SPLIT))
    claimed = dataclasses.replace(made, protocol={**made.protocol, "assignment": "object"})
    found = check(claimed, SPLIT)
    assert sum("is about base category" in line for line in found) == len(foreign)


def share_video(value):
    query, target = value["queries"][0], value["targets"][0]
    shot = value["support"]["shots"][0]
    query["clip"] = {**shot["clip"], "frames": query["clip"]["frames"]}
    query["id"] = target["query"] = f"{shot['clip']['video']}:{target['expression']['id']}"


def share_track(value):
    share_video(value)
    value["targets"][0]["expression"]["objects"] = value["support"]["shots"][0]["expression"]["objects"]


def base_query(value):
    value["targets"][0]["expression"]["category"] = "truck"


def wrong_support(value):
    value["support"]["shots"][0]["expression"]["category"] = "truck"


def base_episode(value):
    value["category"] = value["support"]["category"] = "truck"


def twice_in_support(value):
    value["support"]["shots"] *= 2


def asked_twice(value):
    value["queries"].append(value["queries"][0])
    value["targets"].append(value["targets"][0])


def targets_turned(value):
    value["targets"].reverse()


def fewer_queries(value):
    value["queries"].pop()
    value["targets"].pop()


def no_support(value):
    value["support"]["shots"] = []


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (share_video, "is both support and query"),
        (share_track, "object track"),
        (base_query, "is about base category truck"),
        (wrong_support, "shows truck, not hat"),
        (base_episode, "category truck is not novel in group 1"),
        (twice_in_support, "is support 2 times"),
        (asked_twice, "is asked 2 times"),
        (targets_turned, "targets are not those of the queries"),
        (fewer_queries, "hat: its draws do not ask the same queries"),
        (no_support, "no support"),
    ],
)
def test_planted_leaks_are_found(edit, words, fair):
    found = check(changed(fair, 0, edit), SPLIT)
    assert any(words in line for line in found), found
    assert all("\n" not in line for line in found)


def test_support_of_one_draw_asked_in_another_is_found(fair):
    video = fair.episodes[1].support.shots[0].clip.video

    def ask(value):
        value["queries"][0]["clip"]["video"] = video
        value["queries"][0]["id"] = value["targets"][0]["query"] = f"{video}:1"

    assert any(
        f"video {video} is support of one draw, query of another" in x for x in check(changed(fair, 0, ask), SPLIT)
    )


def test_content_unlike_the_dataset_is_found(index, fair):
    def other_text(value):
        value["queries"][0]["text"] = value["targets"][0]["expression"]["text"] = "another sentence"

    def relabelled(value):
        value["support"]["shots"][0]["expression"]["objects"] = ["9"]

    def other_frame(value):
        value["support"]["shots"][0]["clip"]["frames"] = ["99999"]

    def other_video(value):
        value["support"]["shots"][0]["clip"]["video"] = "elsewhere"

    cases = {
        other_text: "is not as in",
        relabelled: "is not as in",
        other_frame: "frames that",
        other_video: "is not in the",
    }
    for edit, words in cases.items():
        assert any(words in line for line in check(changed(fair, 0, edit), SPLIT, index))


def test_a_training_video_among_the_tested_is_found(index, fair):
    """A video all of whose sentences are about base objects is trained on, whatever a manifest claims of it."""
    clean = next(n for n, v in index.videos.items() if not {e.category for e in v.expressions} & set(SPLIT.groups["1"]))

    def take(value):
        value["support"]["shots"][0]["clip"]["video"] = clean

    assert f"video {clean} is trained on and tested" in check(changed(fair, 0, take), SPLIT, index)


def test_manifest_of_other_metadata_is_refused(fair):
    meta, spoken = metadata()
    del meta["videos"]["hat-0"]
    other = index_from_metadata("mini-ref-youtube-vos", meta, spoken, Path("nowhere"))
    with pytest.raises(InputError, match="its metadata is not that of manifest"):
        check(fair, SPLIT, other)
