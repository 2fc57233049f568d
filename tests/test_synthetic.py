"""The synthetic benchmark: same bytes for the same seed, and sentences that are true of the pixels written."""

import colorsys
import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fewref.episodes.errors import InputError
from fewref.episodes.readers import read_index
from fewref.episodes.synthetic import write_synthetic
from fewref.episodes.synthetic_scene import Cast, generator, plan_scene
from fewref.episodes.synthetic_shapes import PATTERNS, SHAPES, look, outline
from fewref.episodes.synthetic_text import descriptions
from fewref.splits import load_split

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
HUES = {"red": 0, "orange": 30, "yellow": 54, "green": 128, "cyan": 183, "blue": 229, "purple": 279, "pink": 330}
MOTION = re.compile(r"\b(?:moving|going)(?: to the)? (left|right|up|down)|standing (still)|does (not) move")
PLACE = re.compile(r"on the (left|right)|at the (top|bottom)|in the (upper|lower) part")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(root, seed=3, videos_per_category=2, workers=1)
    return root


@pytest.fixture(scope="module")
def youtube(data):
    """Per video: objects, expressions, pixels uint8 (T,H,W,3), labels uint8 (T,H,W), frame names in order."""
    base = data / "mini-ref-youtube-vos"
    meta = json.loads((base / "train/meta.json").read_text("utf-8"))["videos"]
    texts = json.loads((base / "meta_expressions/train/meta_expressions.json").read_text("utf-8"))["videos"]
    assert list(meta) == list(texts)
    videos = {}
    for name in meta:
        frames = sorted(texts[name]["frames"])
        images = np.stack([np.asarray(Image.open(base / f"train/JPEGImages/{name}/{f}.jpg")) for f in frames])
        masks = [Image.open(base / f"train/Annotations/{name}/{f}.png") for f in frames]
        assert {m.mode for m in masks} == {"P"}
        labels = np.stack([np.asarray(m) for m in masks])
        videos[name] = (meta[name]["objects"], texts[name]["expressions"], images, labels, frames)
    return videos


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_whatever_the_workers_and_the_layouts(data, tmp_path):
    write_synthetic(tmp_path / "b", seed=3, videos_per_category=2, layouts=("youtube", "mevis"), workers=2)
    again = digests(tmp_path / "b")
    first = {path: value for path, value in digests(data).items() if path.startswith(("mini-ref-you", "mini-mevis"))}
    assert len(first) > 1500
    assert again == first


def test_another_seed_gives_other_videos(data, tmp_path):
    write_synthetic(tmp_path / "c", seed=4, layouts=("davis",), workers=1)
    names = {path.name for path in (data / "mini-davis/JPEGImages").iterdir()}
    assert names.isdisjoint(path.name for path in (tmp_path / "c/mini-davis/JPEGImages").iterdir())


def test_more_videos_leave_the_first_ones_as_they_are(youtube, tmp_path):
    write_synthetic(tmp_path / "d", seed=3, videos_per_category=1, layouts=("youtube",), workers=1)
    base = tmp_path / "d/mini-ref-youtube-vos/train/JPEGImages"
    assert {path.name for path in base.iterdir()} < set(youtube)


def test_categories_are_new_combinations_of_known_parts():
    looks = {name: look(number) for name, number in load_split("builtin").categories.items()}
    assert len(set(looks.values())) == 48
    for group in load_split("builtin").groups.values():
        novel = [looks[name] for name in group]
        base = [parts for name, parts in looks.items() if name not in group]
        assert sorted(shape for shape, _ in novel) == sorted(SHAPES)
        assert {shape for shape, _ in base} == set(SHAPES)
        assert {pattern for _, pattern in base} == set(PATTERNS)


def test_shapes_are_told_apart_by_their_outline():
    y, x = np.mgrid[-16:17, -16:17] / 13.0
    masks = [outline(shape, x, y) <= 0 for shape in SHAPES]
    for i, a in enumerate(masks):
        assert a.sum() > 150, SHAPES[i]
        for j, b in enumerate(masks[:i]):
            assert (a & b).sum() / (a | b).sum() < 0.85, (SHAPES[i], SHAPES[j])


def test_videos_never_mix_groups_and_hold_two_of_a_kind(youtube):
    ids = load_split("builtin").categories
    assert len(youtube) == 96
    pairs = dict.fromkeys(ids, 0)
    for objects, expressions, _, _, _ in youtube.values():
        kinds = [value["category"] for value in objects.values()]
        assert len({ids[kind] % 4 for kind in kinds}) == 1
        double = [kind for kind in set(kinds) if kinds.count(kind) == 2]
        assert len(double) == 1
        assert len(kinds) in (3, 4)
        pairs[double[0]] += 1
        told = {value["obj_id"] for value in expressions.values()}
        assert {number for number, value in objects.items() if value["category"] == double[0]} <= told <= set(objects)
    assert set(pairs.values()) == {2}


def test_masks_hold_the_listed_objects_in_the_listed_frames(youtube):
    absent = 0
    for objects, _, images, labels, frames in youtube.values():
        assert images.shape == (*labels.shape, 3)
        assert set(np.unique(labels)) - {0} == {int(number) for number in objects}
        for number, value in objects.items():
            shown = [frame for frame, label in zip(frames, labels, strict=True) if (label == int(number)).any()]
            assert shown == value["frames"]
            assert len(shown) >= len(frames) // 2
            absent += len(shown) < len(frames)
    assert 0 < absent < 0.1 * len(youtube)


def test_habits_of_real_files_occur(youtube, data):
    index = read_index("builtin", data)
    assert any(list(video.listed_frames) != sorted(video.listed_frames) for video in index.videos.values())
    assert any("2" not in objects for objects, *_ in youtube.values())
    assert any("1" not in expressions for _, expressions, *_ in youtube.values())
    texts = [value["exp"] for _, expressions, *_ in youtube.values() for value in expressions.values()]
    assert any(not text.isascii() for text in texts)
    assert {len(frames) for *_, frames in youtube.values()} == {8, 12}
    assert max(len(text.split()) for text in texts) <= 16


def hue(pixels):
    """Degrees, from the mean of an object's pixels (both tones have the same hue)."""
    return 360 * colorsys.rgb_to_hsv(*(pixels.mean(0) / 255))[0]


def nearest_colour(angle):
    return min(HUES, key=lambda name: abs((angle - HUES[name] + 180) % 360 - 180))


def facts_seen(images, labels, number):
    """Colour, place (share of width and height, mean) and path of an object, measured on its visible pixels."""
    mask = labels == number
    centres = np.array([np.argwhere(m).mean(0)[::-1] for m in mask if m.any()])
    areas = mask.sum((1, 2))
    whole = areas.min() > 0.82 * areas.max()
    return nearest_colour(hue(images[mask])), centres.mean(0) / labels.shape[:0:-1], centres[-1] - centres[0], whole


def test_sentences_are_true_and_single_out_one_object(youtube):
    checked = {"colour": 0, "colour alone": 0, "place": 0, "place alone": 0, "motion": 0}
    for objects, expressions, images, labels, _ in youtube.values():
        seen = {number: facts_seen(images, labels, int(number)) for number in objects}
        for value in expressions.values():
            text, number = value["exp"], value["obj_id"]
            noun = objects[number]["category"]
            assert noun.replace("_", " ") in text
            rivals = [n for n, other in objects.items() if other["category"] == noun and n != number]
            colour, (x, y), (dx, dy), whole = seen[number]
            place, motion = PLACE.search(text), MOTION.search(text)
            colours = [name for name in HUES if name in text.split()]
            relation = re.search(r" of the |above|below|behind|front", text)
            size = re.search("small|little|big|large", text)
            for name in colours:
                assert name == colour
                checked["colour"] += 1
            if colours and not (place or motion or relation or size):
                assert all(seen[rival][0] != colour for rival in rivals)
                checked["colour alone"] += 1
            if place:
                word = next(filter(None, place.groups()))
                share = {"left": x, "right": 1 - x, "top": y, "upper": y, "bottom": 1 - y, "lower": 1 - y}[word]
                assert share < 0.5
                checked["place"] += 1
                if not (colours or size or relation):
                    axis = 0 if word in ("left", "right") else 1
                    mine, others = (x, y)[axis], [seen[rival][1][axis] for rival in rivals]
                    assert all((other > 0.5) != (mine > 0.5) for other in others)
                    checked["place alone"] += 1
            if motion and whole:
                word = next(filter(None, motion.groups()))
                moved = {"left": -dx, "right": dx, "up": -dy, "down": dy}.get(word)
                assert moved > 8 if moved is not None else max(abs(dx), abs(dy)) < 4
                checked["motion"] += 1
    assert min(checked.values()) >= 8, checked


def test_mix_and_vocabulary_of_the_sentences(youtube):
    nouns = sorted((name.replace("_", " ") for name in load_split("builtin").categories), key=len, reverse=True)
    texts = [value["exp"] for _, expressions, *_ in youtube.values() for value in expressions.values()]
    plain = [re.sub("|".join(rf"\b{noun}\b" for noun in nouns), "NOUN", text) for text in texts]
    assert 1.5 < len(texts) / len(youtube) / 2 < 2.0
    assert len({word for text in plain for word in text.split()}) < 60
    assert sum(text.count("NOUN") > 1 for text in plain) / len(plain) <= 0.1
    assert 0.4 < sum(any(name in text for name in HUES) for text in plain) / len(plain) < 0.75


def test_description_needs_a_clear_difference():
    """Every description a scene allows is checked again by measuring where the objects' masks lie."""
    cast = Cast(("hat", 1), (("shark", 21),))
    for k in range(12):
        scene = plan_scene(generator(f"test/{k}"), cast, 8, (96, 128))
        hats = [n for n, thing in enumerate(scene.things) if thing.category == "hat"]
        shown = scene.visible.sum((2, 3)) / scene.amodal.sum((2, 3))
        assert shown.min() >= 0.3
        assert not (scene.visible[:, None] & scene.visible[None])[~np.eye(3, dtype=bool)].any()
        middle = {n: np.argwhere(scene.amodal[n].any(0)).mean(0) / (96, 128) for n in hats}
        told = {n: {facts for kind, facts in descriptions(scene, (n,))} for n in hats}
        assert told[hats[0]].isdisjoint(told[hats[1]])
        for n in hats:
            for (kind, value), *rest in told[n]:
                if kind == "place" and not rest:
                    axis, sign = {"top": (0, 1), "bottom": (0, -1), "left": (1, 1), "right": (1, -1)}[value]
                    other = hats[1 - hats.index(n)]
                    assert sign * middle[n][axis] < sign * 0.5 < sign * middle[other][axis]


def test_sail_labels_one_object_as_1_or_255(data):
    base = data / "mini-ref-sail-vos"
    meta = json.loads((base / "meta.json").read_text("utf-8"))["videos"]
    assert sorted({value["objects"]["1"]["category"] for value in meta.values()}) == ["car", "dog", "person"]
    values = set()
    for name, video in meta.items():
        assert list(video["objects"]) == ["1"]
        frames = sorted(path.stem for path in (base / "Images" / name).glob("*.bmp"))
        masks = [np.asarray(Image.open(base / "Annotations" / name / f"{frame}.png")) for frame in frames]
        stored = {int(v) for mask in masks for v in np.unique(mask)} - {0}
        assert len(stored) == 1
        values |= stored
    assert values == {1, 255}


def test_davis_has_four_different_sentences_per_object(data):
    index = read_index("builtin-davis", data)
    assert len(index.videos) == 42
    for video in index.videos.values():
        assert [e.objects[0] for e in video.expressions] == [n for n in video.objects for _ in range(4)]
        assert len({e.text for e in video.expressions}) == len(video.expressions)


def test_mevis_sets_and_masks_agree(data):
    base = data / "mini-mevis"
    videos = json.loads((base / "meta_expressions.json").read_text("utf-8"))["videos"]
    masks = json.loads((base / "mask_dict.json").read_text("utf-8"))
    categories = json.loads((base / "categories.json").read_text("utf-8"))
    plurals = r"\b(?:boat|cat|dog|elephant|horse|truck)s\b"
    counts = []
    for name, video in videos.items():
        for value in video["expressions"].values():
            counts.append(len(value["obj_id"]))
            assert len(value["anno_id"]) == len(value["obj_id"])
            assert len({categories[name][str(number)] for number in value["obj_id"]}) <= 1
            plural = value["exp"].startswith("every ") or re.search(plurals, value["exp"]) is not None
            assert plural == (counts[-1] > 1), value["exp"]
            union = [masks[str(number)] for number in value["anno_id"]]
            assert all(len(track) == len(video["frames"]) for track in union)
            for codes in zip(*union, strict=True):
                assert sum(coco.decode(code) for code in codes if code).max() == 1
    assert counts.count(0) >= 2
    assert sum(count > 1 for count in counts) >= 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": ("davos",)}, "'davos' is unknown; did you mean 'davis'"),
        ({"frames": 3}, "frames 3 is too small"),
        ({"size": (96, 20)}, "width 20 is too small"),
        ({"videos_per_category": 0}, "videos per category 0 is too small"),
        ({"workers": 0}, "workers 0 is too small"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write_synthetic(tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("keep")
    with pytest.raises(InputError, match="mine: exists and is not an empty folder"):
        write_synthetic(tmp_path / "mine", layouts=("sail",))
    assert digests(tmp_path) == {"mine/file": hashlib.sha256(b"keep").hexdigest()}
    with pytest.raises(InputError, match="cannot be written"):
        write_synthetic(tmp_path / "mine/file/below", layouts=("sail",))


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_synthetic(tmp_path / "new", layouts=("davis",), workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("frames", "size"), [(4, (64, 64)), (5, (64, 80)), (12, (64, 64))])
def test_short_and_small_videos_can_be_written(tmp_path, frames, size):
    write_synthetic(tmp_path / "x", videos_per_category=1, layouts=("youtube",), frames=frames, size=size, workers=1)
    assert len(read_index("mini-ref-youtube-vos", tmp_path / "x/mini-ref-youtube-vos").videos) == 48
