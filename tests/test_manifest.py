"""Manifests: what is written is what is read, a changed file is refused, the package's own are sound."""

import collections
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from fewref.episodes.errors import InputError
from fewref.episodes.leakage import check
from fewref.episodes.manifest import FROZEN, Manifest, check_matches, find_manifest, read_manifest, write_manifest
from fewref.episodes.readers import index_from_metadata, read_index
from fewref.episodes.sampler import PROTOCOLS, build_manifest, episode_protocol
from fewref.episodes.show import episode_text, find_episode
from fewref.episodes.synthetic import FOLDERS, write_synthetic
from fewref.episodes.types import Clip, Episode, Expression, Query, Shot, SupportSet, Target, from_json, to_json
from fewref.splits import load_split

SPLIT = load_split("mini-ref-youtube-vos")


def dataset(per_category=8, frames=30, expressions=4):
    """Every category with so many videos of one object; texts beyond ASCII."""
    names = [f"{5 * k:05d}" for k in range(frames)]
    meta, spoken = {}, {}
    for category in SPLIT.categories:
        for number in range(per_category):
            video = hashlib.sha256(f"{category}{number}".encode()).hexdigest()[:10]
            meta[video] = {"objects": {"1": {"category": category, "frames": names}}}
            said = {str(k): {"exp": f"the {category} à gauche, №{k}", "obj_id": "1"} for k in range(expressions)}
            spoken[video] = {"frames": names, "expressions": said}
    return index_from_metadata("mini-ref-youtube-vos", {"videos": meta}, {"videos": spoken}, Path("nowhere"))


@pytest.fixture(scope="module")
def index():
    return dataset()


@pytest.fixture(scope="module")
def manifest(index):
    return build_manifest(index, SPLIT, "2", PROTOCOLS["group"])


def hand_made():
    clip = Clip("toy", "a", ("00000", "00005"))
    support = SupportSet("hat", (Shot(clip, Expression("3", "a hat", ("1", "4"), "hat")),))
    asked = Expression("0", "ein Hut, größer", ("2",), "hat")
    query = Query("b:0", Clip("toy", "b", ("00000",)), asked.text)
    episode = Episode("toy", "1", "hat", 0, support, (query,), (Target("b:0", asked),))
    return Manifest("toy", {"name": "group", "shots": 1}, "0" * 64, (episode,), ("shark: left out",))


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_written_manifests_are_read_back(name, index, tmp_path):
    made = build_manifest(index, SPLIT, "1", episode_protocol(name, **({"episodes": 9} if name == "random" else {})))
    path = tmp_path / made.file_name
    write_manifest(path, made)
    again = read_manifest(path)
    assert again == made
    assert again.hash == made.hash
    assert [episode.id for episode in again.episodes] == [episode.id for episode in made.episodes]
    assert [from_json(to_json(episode)) for episode in made.episodes] == list(again.episodes)
    assert find_manifest("mini-ref-youtube-vos", "1", name, tmp_path) == path
    write_manifest(tmp_path / "second.json", again)
    assert (tmp_path / "second.json").read_bytes() == path.read_bytes()


def test_hand_made_manifest_keeps_every_field(tmp_path):
    made = hand_made()
    write_manifest(tmp_path / "m.json", made)
    assert read_manifest(tmp_path / "m.json") == made
    assert made.file_name == f"toy-1-group-{made.hash[:12]}.json"
    packed = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    stated = packed.pop("sha256")
    canonical = json.dumps(packed, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == stated == made.hash


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "mini-davis"},
        {"protocol": {"name": "group", "shots": 5}},
        {"metadata_hash": "1" * 64},
        {"notes": ()},
    ],
)
def test_hash_covers_every_field(change):
    made = hand_made()
    if "dataset" in change:
        text = json.dumps(to_json(made.episodes[0])).replace('"toy"', '"mini-davis"')
        change = {**change, "episodes": (from_json(json.loads(text)),)}
    assert dataclasses.replace(made, **change).hash != made.hash


def test_hash_covers_the_episodes():
    made = hand_made()
    episode = made.episodes[0]
    shot = dataclasses.replace(episode.support.shots[0], clip=Clip("toy", "a", ("00000",)))
    support = dataclasses.replace(episode.support, shots=(shot,))
    for changed in (dataclasses.replace(episode, seed=1), dataclasses.replace(episode, support=support)):
        assert dataclasses.replace(made, episodes=(changed,)).hash != made.hash


def test_what_cannot_be_stored_is_refused():
    made = hand_made()
    episode = made.episodes[0]
    other = dataclasses.replace(episode.queries[0], text="another sentence")
    for changed in (dataclasses.replace(episode, queries=(other,)), dataclasses.replace(episode, dataset="x")):
        with pytest.raises(ValueError, match="not"):
            _ = dataclasses.replace(made, episodes=(changed,)).hash


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("à gauche", "à droite", 1), "does not match its sha256"),
        (lambda text: text.replace('"seed":3', '"seed":4', 1), "does not match its sha256"),
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"version":1', '"version":9'), "manifest version 9"),
        (lambda text: text.replace("fewref-manifest", "other"), "not a manifest"),
        (lambda text: "[1, 2]", "not a manifest"),
        (lambda text: "", "not valid JSON"),
    ],
)
def test_changed_files_are_refused_in_one_line(edit, message, manifest, tmp_path):
    path = tmp_path / "m.json"
    write_manifest(path, manifest)
    text = path.read_text(encoding="utf-8")
    assert edit(text) != text
    path.write_text(edit(text), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rightly_hashed_file_without_its_tables_is_refused(tmp_path):
    packed = {"format": "fewref-manifest", "version": 1, "dataset": "toy", "group": "1"}
    canonical = json.dumps(packed, sort_keys=True, separators=(",", ":"))
    packed["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    (tmp_path / "m.json").write_text(json.dumps(packed))
    with pytest.raises(InputError, match="malformed manifest"):
        read_manifest(tmp_path / "m.json")


def test_manifest_of_other_data_is_refused(index, manifest):
    check_matches(manifest, index)
    with pytest.raises(InputError, match="its metadata is not that of manifest"):
        check_matches(manifest, dataset(expressions=3))
    with pytest.raises(InputError, match="is of mini-ref-youtube-vos"):
        check_matches(manifest, dataclasses.replace(index, dataset="builtin"))


def test_find_manifest_needs_exactly_one(tmp_path):
    with pytest.raises(InputError, match="episodes build"):
        find_manifest("builtin", "1", "group", tmp_path)
    for digits in ("0" * 12, "a" * 12):
        (tmp_path / f"builtin-1-group-{digits}.json").touch()
    with pytest.raises(InputError, match="several manifests"):
        find_manifest("builtin", "1", "group", tmp_path)


def test_five_draws_over_twelve_categories_stay_small(tmp_path):
    made = build_manifest(dataset(per_category=35, expressions=5), SPLIT, "1", PROTOCOLS["group"])
    assert len(made.episodes) == 60
    write_manifest(tmp_path / "m.json", made)
    assert (tmp_path / "m.json").stat().st_size < 300_000


def test_frozen_manifests_are_sound():
    """Every list in the package reads, bears its own hash in its name and shows no leak."""
    paths = sorted(FROZEN.glob("*.json"))
    assert {path.name.rsplit("-", 1)[0] for path in paths} >= {f"builtin-{group}-group" for group in "1234"}
    for path in paths:
        made = read_manifest(path)
        assert path.name == made.file_name
        assert check(made, load_split(made.dataset)) == []


def test_frozen_manifests_are_those_of_the_built_in_data(tmp_path):
    write_synthetic(tmp_path / "data")
    for dataset in ("builtin", "builtin-sail", "builtin-davis", "builtin-mevis"):
        split = load_split(dataset)
        index = read_index(dataset, tmp_path / "data" / FOLDERS[split.layout])
        for group in index.split().groups:
            for name in ("group", "cma-paper"):
                made = build_manifest(index, index.split(), group, episode_protocol(name))
                assert (FROZEN / made.file_name).exists()


def test_episode_in_words(manifest):
    episode = manifest.episodes[7]
    text = episode_text(find_episode([manifest], episode.id[:8]))
    shot = episode.support.shots[0]
    assert episode.id in text
    assert f"{episode.category}, mini-ref-youtube-vos, group 2, draw {episode.seed}" in text
    assert f"video {shot.clip.video}, frames {' '.join(shot.clip.frames)}" in text
    assert f'"{shot.expression.text}"' in text
    assert (
        f"queries: {len(episode.queries)} expressions in {len({q.clip.video for q in episode.queries})} videos" in text
    )
    assert all(f'object 1 "{query.text}"' in text for query in episode.queries)
    assert text.count("video ") == 1 + len({q.clip.video for q in episode.queries})
    with pytest.raises(InputError, match="no episode 'zz'"):
        find_episode([manifest], "zz")
    digits = collections.Counter(e.id[0] for e in manifest.episodes)  # 60 ids, 16 digits
    with pytest.raises(InputError, match="give more digits"):
        find_episode([manifest], digits.most_common(1)[0][0])
