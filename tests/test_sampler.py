"""Episodes by explicit generators: the window rule, distinct supports, equal queries, independence of every order."""

import collections
import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewref.episodes import leakage
from fewref.episodes.errors import InputError
from fewref.episodes.readers import index_from_metadata
from fewref.episodes.sampler import (
    PROTOCOLS,
    EpisodeProtocol,
    build_manifest,
    episode_protocol,
    sample_episodes,
    training_pools,
    window,
)
from fewref.splits import load_split

SPLIT = load_split("mini-ref-youtube-vos")


def fake_metadata(seed, videos=240, categories=tuple(SPLIT.categories)):
    """Random annotation files: several objects per video, some of other categories, objects that come and go."""
    rng = random.Random(seed)
    meta, spoken = {}, {}
    for number in range(videos):
        name = f"{rng.getrandbits(32):08x}"
        frames = [f"{5 * k:05d}" for k in range(rng.randint(1, 12))]
        own = categories[number % len(categories)]
        objects = {}
        for key in range(1, rng.randint(1, 3) + 1):
            seen = sorted(rng.sample(frames, rng.randint(0, len(frames))))
            objects[str(key)] = {"category": own if rng.random() < 0.8 else rng.choice(categories), "frames": seen}
        texts = {
            str(k): {"exp": f"the {own} no {k}", "obj_id": rng.choice(list(objects))} for k in range(rng.randint(1, 5))
        }
        meta[name], spoken[name] = {"objects": objects}, {"frames": frames, "expressions": texts}
    return {"videos": meta}, {"videos": spoken}


def index_of(metadata, dataset="mini-ref-youtube-vos"):
    return index_from_metadata(dataset, *metadata, Path("nowhere"))


def shuffled(value, rng):
    """The same JSON value with every table in another order."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return value


@pytest.fixture(scope="module")
def index():
    return index_of(fake_metadata(0))


def test_window_by_its_definition():
    for count in range(1, 12):
        for wanted in range(1, 14):
            found = [window(count, wanted, drawn) for drawn in range(count)]
            assert all(len(clip) == wanted for clip in found)
            if wanted == 1:
                assert found == [[drawn] for drawn in range(count)]
            elif wanted <= count:
                starts = collections.Counter(clip[0] for clip in found)
                assert starts == {0: wanted, **dict.fromkeys(range(1, count - wanted + 1), 1)}
                assert all(np.diff(clip).tolist() == [1] * (wanted - 1) for clip in found)
                assert all(drawn in clip for drawn, clip in enumerate(found))
            else:
                assert all(clip == [min(k, count - 1) for k in range(wanted)] for clip in found)


@pytest.mark.parametrize(("count", "wanted", "drawn"), [(3, 2, 3), (3, 2, -1), (0, 1, 0), (3, 0, 0)])
def test_window_refuses(count, wanted, drawn):
    with pytest.raises(ValueError, match="window"):
        window(count, wanted, drawn)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "protocol",
    [
        EpisodeProtocol("group"),
        EpisodeProtocol("group", shots=3, supports=2, support_frames=3, seed=7),
        EpisodeProtocol("group", shots=2, supports=5, support_frames=1),
        EpisodeProtocol("random", shots=2, supports=2, episodes=20),
        EpisodeProtocol("cma-paper", supports=2, assignment="last_expression"),
    ],
    ids=lambda p: f"{p.name}-{p.shots}-{p.supports}",
)
def test_supports_are_distinct_shown_and_never_asked(protocol, seed):
    index = index_of(fake_metadata(seed))
    for group in SPLIT.groups:
        manifest = build_manifest(index, SPLIT, group, protocol)
        assert manifest.group == group
        assert leakage.check(manifest, SPLIT, index) == []
        for episode in manifest.episodes:
            shown = [shot.clip.video for shot in episode.support.shots]
            assert len(set(shown)) == len(shown) == protocol.shots
            assert episode.queries
            assert not set(shown) & {query.clip.video for query in episode.queries}
            assert episode.category in SPLIT.groups[group]
            for shot in episode.support.shots:
                assert_drawn_by_the_rule(index, shot, protocol.support_frames, episode.category)


def assert_drawn_by_the_rule(index, shot, wanted, category):
    video = index.videos[shot.clip.video]
    positions = [video.frames.index(name) for name in shot.clip.frames]
    assert positions in [window(len(video.frames), wanted, k) for k in range(len(video.frames))]
    assert shot.expression in video.expressions
    assert shot.expression.category == category
    assert any(shot.clip.frames[wanted // 2] in video.visible[item] for item in shot.expression.objects)


def test_group_asks_every_other_expression_of_the_category_under_each_draw(index):
    protocol = EpisodeProtocol("group", supports=2)
    episodes = sample_episodes(index, SPLIT, "1", protocol)
    for category in {episode.category for episode in episodes}:
        draws = [episode for episode in episodes if episode.category == category]
        assert [episode.seed for episode in draws] == [0, 1]
        shown = {shot.clip.video for episode in draws for shot in episode.support.shots}
        assert len(shown) == 2
        want = [
            (f"{name}:{item.id}", item.text, video.frames, item)
            for name, video in sorted(index.videos.items())
            for item in video.expressions
            if item.category == category and name not in shown
        ]
        for episode in draws:
            found = [
                (q.id, q.text, q.clip.frames, t.expression)
                for q, t in zip(episode.queries, episode.targets, strict=True)
            ]
            assert found == want


def test_cma_paper_asks_all_records_of_the_other_videos(index):
    for episode in sample_episodes(index, SPLIT, "2", PROTOCOLS["cma-paper"]):
        videos = [n for n in sorted(index.videos) if index.videos[n].expressions[-1].category == episode.category]
        videos.remove(episode.support.shots[0].clip.video)
        assert [t.expression for t in episode.targets] == [e for n in videos for e in index.videos[n].expressions]


def test_random_episodes_are_distinct_and_reach_every_category(index):
    protocol = EpisodeProtocol("random", supports=2, episodes=300)
    episodes = sample_episodes(index, SPLIT, "1", protocol)
    assert len({episode.id for episode in episodes}) == len(episodes) == 600
    assert all(len(episode.queries) == 1 for episode in episodes)
    assert collections.Counter(episode.seed for episode in episodes) == {0: 300, 1: 300}
    by_category = collections.Counter(episode.category for episode in episodes)
    assert set(by_category) == set(SPLIT.groups["1"])
    assert all(20 < count < 90 for count in by_category.values())  # 50 each by chance, 6.8 standard deviation


def test_few_videos_share_supports_and_fewer_leave_the_category_out():
    frames = [f"{k:05d}" for k in range(6)]
    counts = {"hat": 4, "raccoon": 1, "shark": 6}
    meta, spoken = {}, {}
    for category, count in counts.items():
        for number in range(count):
            meta[f"{category}{number}"] = {"objects": {"1": {"category": category, "frames": frames}}}
            spoken[f"{category}{number}"] = {"frames": frames, "expressions": {"0": {"exp": category, "obj_id": "1"}}}
    manifest = build_manifest(index_of(({"videos": meta}, {"videos": spoken})), SPLIT, "1", EpisodeProtocol())
    draws = collections.defaultdict(list)
    for episode in manifest.episodes:
        draws[episode.category].append(episode)
    assert {category: len(found) for category, found in draws.items()} == {"hat": 5, "shark": 5}
    assert len({e.support.shots[0].clip.video for e in draws["hat"]}) == 2  # half are left to be asked
    assert len({e.support.shots[0].clip.video for e in draws["shark"]}) == 5
    assert {e.category: len(e.queries) for e in manifest.episodes} == {"hat": 2, "shark": 1}
    assert len({e.id for e in manifest.episodes}) == 10
    notes = {note.split(":")[0]: note for note in manifest.notes}
    assert "left out, videos: 1," in notes["raccoon"]
    assert "share" in notes["hat"]
    assert "shark" not in notes
    assert len(notes) == 11  # and the nine categories without a video


def test_supports_whose_masks_are_refused_are_drawn_again(index):
    plain = build_manifest(index, SPLIT, "1", EpisodeProtocol())
    refused = {shot.clip.video for episode in plain.episodes[:3] for shot in episode.support.shots}
    asked = []

    def verify(shot):
        asked.append(shot)
        return shot.clip.video not in refused

    again = build_manifest(index, SPLIT, "1", EpisodeProtocol(), verify)
    assert asked
    assert not refused & {shot.clip.video for e in again.episodes for shot in e.support.shots}
    accepted = build_manifest(index, SPLIT, "1", EpisodeProtocol(), lambda shot: True)
    assert accepted.hash == plain.hash
    with pytest.raises(InputError, match="masks show the object"):
        build_manifest(index, SPLIT, "1", EpisodeProtocol(), lambda shot: False)


def test_seeds_shift_draws_and_more_draws_keep_the_first(index):
    first = sample_episodes(index, SPLIT, "1", EpisodeProtocol(supports=2))
    more = sample_episodes(index, SPLIT, "1", EpisodeProtocol(supports=3))
    other = sample_episodes(index, SPLIT, "1", EpisodeProtocol(supports=2, seed=1))
    supports = {(e.category, e.seed): e.support for e in more}
    assert all(supports[e.category, e.seed] == e.support for e in first if (e.category, 2) in supports)
    assert [e.support for e in first] != [e.support for e in other]


def test_a_category_without_relation_changes_no_other(index):
    fewer = dataclasses.replace(
        index, videos={n: v for n, v in index.videos.items() if all(c != "shark" for c in v.objects.values())}
    )
    gone = set(index.videos) - set(fewer.videos)
    touched = {item.category for name in gone for item in index.videos[name].expressions}
    before = {e.id: e for e in sample_episodes(index, SPLIT, "1", EpisodeProtocol())}
    after = {e.id for e in sample_episodes(fewer, SPLIT, "1", EpisodeProtocol())}
    same = [name for name, episode in before.items() if episode.category not in touched]
    assert same
    assert set(same) <= after


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_manifest_does_not_depend_on_the_order_of_keys(name):
    metadata = fake_metadata(3, videos=120)
    protocol = episode_protocol(name, **({"episodes": 10} if name == "random" else {}))
    want = build_manifest(index_of(metadata), SPLIT, "3", protocol)
    for seed in range(3):
        again = index_of(shuffled(metadata, random.Random(seed)))
        assert build_manifest(again, SPLIT, "3", protocol).hash == want.hash


SCRIPT = """
import os, random, sys
from pathlib import Path
seed = int(sys.argv[2])
listing, scan = os.listdir, Path.iterdir
def mixed(items):
    items = list(items)
    random.Random(seed).shuffle(items)
    return items
os.listdir = lambda *a: mixed(listing(*a))
Path.iterdir = lambda self: iter(mixed(scan(self)))
from fewref.episodes.readers import read_index
from fewref.episodes.sampler import build_manifest, episode_protocol
from fewref.splits import load_split
index = read_index("mini-ref-youtube-vos", Path(sys.argv[1]))
for name, changes in (("group", {}), ("random", {"episodes": 5}), ("cma-paper", {})):
    print(build_manifest(index, load_split("mini-ref-youtube-vos"), "1", episode_protocol(name, **changes)).hash)
"""


def test_manifest_is_the_same_under_other_hash_seeds_file_orders_and_folders(tmp_path):
    """Whole processes: shuffled JSON tables, shuffled directory listings, another root, PYTHONHASHSEED; no images."""
    metadata = fake_metadata(4, videos=120)
    found = []
    for seed in range(3):
        root = tmp_path / f"copy{seed}"
        meta, spoken = (shuffled(part, random.Random(seed)) for part in metadata)
        train = root / "data" / "mini-ref-youtube-vos" / "train"
        (train / "JPEGImages").mkdir(parents=True)
        (train / "Annotations").mkdir()
        (train / "meta.json").write_text(json.dumps(meta))
        sentences = train.parent / "meta_expressions" / "train" / "meta_expressions.json"
        sentences.parent.mkdir(parents=True)
        sentences.write_text(json.dumps(spoken))
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        command = (
            [sys.executable, "-P", "-c", SCRIPT] if sys.version_info >= (3, 11) else [sys.executable, "-c", SCRIPT]
        )
        run = subprocess.run(
            [*command, str(root), str(seed)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.split())
    assert found[0] == found[1] == found[2]
    index = index_of(metadata)
    assert found[0][0] == build_manifest(index, SPLIT, "1", EpisodeProtocol()).hash


def test_draws_are_frozen():
    """A change of this number is a change of every published manifest."""
    frames = [f"{5 * k:05d}" for k in range(10)]
    meta = {f"v{k}": {"objects": {"1": {"category": "hat", "frames": frames}}} for k in range(10)}
    spoken = {f"v{k}": {"frames": frames, "expressions": {"0": {"exp": "a hat", "obj_id": "1"}}} for k in range(10)}
    episodes = sample_episodes(index_of(({"videos": meta}, {"videos": spoken})), SPLIT, "1", EpisodeProtocol())
    assert [(e.support.shots[0].clip.video, e.support.shots[0].clip.frames[0]) for e in episodes] == FROZEN


FROZEN = [("v6", "00000"), ("v3", "00015"), ("v9", "00025"), ("v2", "00020"), ("v8", "00000")]


@pytest.mark.parametrize("group", sorted(SPLIT.groups))
def test_training_pools_hold_base_objects_of_clean_videos_only(index, group):
    novel = set(SPLIT.groups[group])
    want = collections.defaultdict(list)
    for name in sorted(index.videos):
        video = index.videos[name]
        if not novel & {item.category for item in video.expressions}:
            for item in video.expressions:
                want[item.category].append((name, item))
    pools = training_pools(index, SPLIT, group)
    assert list(pools) == [name for name in SPLIT.categories if name not in novel]
    assert {category: list(samples) for category, samples in pools.items() if samples} == want


def test_groupless_datasets_have_one_group_and_nothing_to_train_on():
    split = load_split("mini-davis")
    index = index_of(fake_metadata(5, videos=40, categories=("dog", "kite", "paraglider")), "mini-davis")
    episodes = sample_episodes(index, split, "all", EpisodeProtocol())
    assert {(e.group, e.category) for e in episodes} == {("all", c) for c in ("dog", "kite", "paraglider")}
    with pytest.raises(InputError, match="no base category"):
        training_pools(index, split, "all")


def test_bad_options(index):
    with pytest.raises(InputError, match="'groop'.*did you mean 'group'"):
        episode_protocol("groop")
    with pytest.raises(InputError, match="no group '5'"):
        sample_episodes(index, SPLIT, "5", EpisodeProtocol())
    with pytest.raises(InputError, match="shots must be at least 1"):
        sample_episodes(index, SPLIT, "1", EpisodeProtocol(shots=0))
    with pytest.raises(InputError, match="episodes must be at least 1"):
        sample_episodes(index, SPLIT, "1", EpisodeProtocol("random"))
    with pytest.raises(InputError, match="unknown assignment"):
        sample_episodes(index, SPLIT, "1", EpisodeProtocol(assignment="video"))
    with pytest.raises(InputError, match="ask for fewer shots"):
        sample_episodes(index, SPLIT, "1", EpisodeProtocol(shots=1000))
    with pytest.raises(InputError, match="distinct random episodes"):
        sample_episodes(index_of(fake_metadata(6, videos=96)), SPLIT, "1", EpisodeProtocol("random", episodes=5000))
    with pytest.raises(InputError, match="was read as mini-ref-youtube-vos"):
        sample_episodes(index, load_split("builtin"), "1", EpisodeProtocol())
