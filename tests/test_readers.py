"""Hand-made folders in every layout and spelling, with the oddities of the real files; truth is the arrays drawn."""

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fewref.episodes.errors import InputError
from fewref.episodes.metadata import normalise
from fewref.episodes.readers import frame_path, index_from_metadata, read_frame, read_index, read_masks

GOLDEN = Path(os.environ.get("FEWREF_GOLDEN_DIR", Path(__file__).parent / "golden")) / "protocol"
FRAMES = ("00000", "00005", "00010")
LABELS = np.zeros((3, 6, 8), np.uint8)
LABELS[:, 1:3, 1:4] = 1
LABELS[1:, 3:5, 4:7] = 7  # object 7 enters in the second frame; ids have a gap


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def picture(t: int) -> np.ndarray:
    """A frame of flat colour, so that JPEG keeps it nearly as it is; higher in red than in blue, to catch BGR."""
    return np.broadcast_to(np.uint8([200, 100 + 10 * t, 30]), (6, 8, 3))


def draw_images(folder: Path, suffix: str = "jpg") -> None:
    folder.mkdir(parents=True)
    for t, frame in enumerate(FRAMES):
        Image.fromarray(np.ascontiguousarray(picture(t))).save(folder / f"{frame}.{suffix}")


def draw_masks(folder: Path, labels: np.ndarray = LABELS, palette: bool = True, leave_out: str = "") -> None:
    folder.mkdir(parents=True)
    for frame, label in zip(FRAMES, labels, strict=True):
        image = Image.fromarray(label)
        if palette:
            image.putpalette(bytes(range(255, -1, -1)) * 3)  # colours unlike the ids: only indices may count
        if frame != leave_out:
            image.save(folder / f"{frame}.png")


META = {
    "videos": {"v": {"objects": {"7": {"category": "dog", "frames": ["00010", "00005"]}, "1": {"category": "cat"}}}}
}
SPOKEN = {
    "videos": {
        "v": {
            "frames": ["00010", "00000", "00005"],
            "expressions": {
                "10": {"exp": "  The DOG,\tto the  right ", "obj_id": "7"},
                "2": {"exp": "Größe – the Cat", "obj_id": 1},
            },
        }
    }
}
SPELLINGS = [
    ("mini-ref-youtube-vos", "", "train/meta.json", "meta_expressions/train/meta_expressions.json", "train/"),
    ("mini-ref-youtube-vos", "data/mini-ref-youtube-vos", "train/meta.json", "meta_expressions.json", "train/"),
    ("mini-ref-youtube-vos", "data/Mini-Ref-YouTube-VOS", "train/train.json", "meta_expressions.json", "train/"),
    ("mini-ref-youtube-vos", "Mini-Ref-YouTube-VOS", "train.json", "meta_expressions/meta_expressions.json", "train/"),
    ("builtin", "mini-ref-youtube-vos", "train/meta.json", "meta_expressions/train/meta_expressions.json", "train/"),
    ("mini-ref-sail-vos", "data/mini-SAIL-VOS", "meta.json", "meta_expressions.json", ""),
    ("mini-ref-sail-vos", "Mini-Ref-SAIL-VOS", "train/train.json", "meta_expressions/meta_expressions.json", "train/"),
    ("builtin-sail", "mini-ref-sail-vos", "meta.json", "meta_expressions.json", ""),
    ("mini-davis", "", "meta.json", "meta_expressions.json", ""),
    ("mini-davis", "Mini-DAVIS", "valid/meta.json", "meta_expressions/valid/meta_expressions.json", "valid/"),
    ("mini-davis", "data/Mini-DAVIS", "train/meta.json", "meta_expressions/train/meta_expressions.json", ""),
    ("mini-mevis", "Mini-MeViS", "meta.json", "meta_expressions/train/meta_expressions.json", ""),
]


@pytest.mark.parametrize(("dataset", "folder", "meta", "spoken", "pixels"), SPELLINGS)
def test_every_spelling_gives_the_same_index_and_pixels(tmp_path, dataset, folder, meta, spoken, pixels):
    base = tmp_path / folder
    sail = dataset.endswith(("sail", "sail-vos")) and not pixels
    put(base / meta, META)
    put(base / spoken, SPOKEN)
    draw_images(base / f"{pixels}{'Images' if sail else 'JPEGImages'}/v", "bmp" if sail else "jpg")
    draw_masks(base / f"{pixels}Annotations/v")
    for root in {tmp_path, base}:
        index = read_index(dataset, root)
        assert meta in index.found
        assert spoken in index.found
        assert index.warnings == ()
        video = index.videos["v"]
        assert video.frames == FRAMES
        assert list(video.objects.items()) == [("1", "cat"), ("7", "dog")]
        assert video.visible == {"1": FRAMES, "7": FRAMES[1:]}
        assert [(e.id, e.text, e.objects, e.category) for e in video.expressions] == [
            ("2", "größe – the cat", ("1",), "cat"),
            ("10", "the dog, to the right", ("7",), "dog"),
        ]
        assert video.listed_expressions == ("10", "2")
        assert video.listed_frames == ("00010", "00000", "00005")
        for t, frame in enumerate(FRAMES):
            pixel = read_frame(index, "v", frame)
            assert pixel.dtype == np.uint8
            assert pixel.shape == (6, 8, 3)
            assert np.abs(pixel.astype(int) - picture(t)).max() <= 3
        masks = read_masks(index, "v", FRAMES, ["7"])
        assert masks.dtype == bool
        assert np.array_equal(masks, LABELS == 7)
        assert np.array_equal(read_masks(index, "v", FRAMES[::-1], ["1", "7"]), LABELS[::-1] > 0)
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()).count(".json") == 2  # nothing was written


def davis(root: Path, **masks: object) -> Path:
    put(root / "meta.json", META)
    put(root / "meta_expressions.json", SPOKEN)
    draw_images(root / "JPEGImages/v")
    draw_masks(root / "Annotations/v", **masks)
    return root


def test_parts_are_merged_and_one_meta_may_serve_both(tmp_path):
    put(tmp_path / "meta.json", {"videos": dict.fromkeys(("b", "a", "mute"), META["videos"]["v"])})
    for part, name in (("train", "b"), ("valid", "a")):
        spoken = {"videos": {name: SPOKEN["videos"]["v"]}}
        put(tmp_path / f"meta_expressions/{part}/meta_expressions.json", spoken)
        draw_images(tmp_path / f"{part}/JPEGImages/{name}")
    index = read_index("mini-davis", tmp_path)
    assert list(index.videos) == ["a", "b"]
    assert frame_path(index, "a", "00000") == tmp_path / "valid/JPEGImages/a/00000.jpg"
    assert frame_path(index, "b", "00000") == tmp_path / "train/JPEGImages/b/00000.jpg"
    assert len(index.warnings) == 1
    assert "mute" in index.warnings[0]


def test_a_frame_without_mask_is_empty_and_grey_files_keep_their_values(tmp_path):
    index = read_index("mini-davis", davis(tmp_path, palette=False, leave_out="00005"))
    masks = read_masks(index, "v", FRAMES, ["7"])
    assert masks.sum((1, 2)).tolist() == [0, 0, 6]
    assert np.array_equal(masks[2], LABELS[2] == 7)


def test_other_modes_go_through_a_palette(tmp_path):
    davis(tmp_path)
    rgba = np.zeros((6, 8, 4), np.uint8)
    image = Image.fromarray(rgba)
    image.save(tmp_path / "Annotations/v/00000.png")
    index = read_index("mini-davis", tmp_path)
    expected = np.asarray(image.convert("P")) == 1
    assert np.array_equal(read_masks(index, "v", ["00000"], ["1"])[0], expected)


@pytest.mark.parametrize(
    ("objects", "value", "wanted", "area"),
    [
        ({"3": "dog"}, 255, "3", 6),  # one object, stored as 255
        ({"3": "dog"}, 3, "3", 6),
        ({"3": "dog"}, 1, "3", 0),  # upstream would take any value for object 1; here the id counts
        ({"1": "dog", "2": "car"}, 255, "1", 0),
        ({"1": "dog", "2": "car"}, 2, "2", 6),  # empty upstream
        ({"1": "dog", "2": "car"}, 2, "1", 0),  # everything upstream
    ],
)
def test_sail_masks_compare_with_the_id(tmp_path, objects, value, wanted, area):
    put(tmp_path / "meta.json", {"videos": {"v": {"objects": {k: {"category": c} for k, c in objects.items()}}}})
    spoken = {k: {"exp": "it", "obj_id": k} for k in objects}
    put(tmp_path / "meta_expressions.json", {"videos": {"v": {"frames": FRAMES, "expressions": spoken}}})
    draw_images(tmp_path / "Images/v", "bmp")
    draw_masks(tmp_path / "Annotations/v", np.where(LABELS == 1, value, 0).astype(np.uint8))
    index = read_index("mini-ref-sail-vos", tmp_path)
    assert read_masks(index, "v", FRAMES, [wanted]).sum((1, 2)).tolist() == [area] * 3


def test_elsewhere_255_is_an_id_like_any_other(tmp_path):
    davis(tmp_path, labels=np.where(LABELS == 1, 255, 0).astype(np.uint8))
    put(tmp_path / "meta.json", {"videos": {"v": {"objects": {"7": {"category": "dog"}}}}})
    assert not read_masks(read_index("mini-davis", tmp_path), "v", FRAMES, ["7"]).any()


def test_ids_are_in_the_order_of_their_numbers(tmp_path):
    davis(tmp_path)
    objects = {number: {"category": "dog"} for number in ("10", "2", "1", "21")}
    spoken = {number: {"exp": "it", "obj_id": "2"} for number in ("11", "100", "9")}
    put(tmp_path / "meta.json", {"videos": {"v": {"objects": objects}}})
    put(tmp_path / "meta_expressions.json", {"videos": {"v": {"frames": FRAMES, "expressions": spoken}}})
    video = read_index("mini-davis", tmp_path).videos["v"]
    assert list(video.objects) == ["1", "2", "10", "21"]
    assert [expression.id for expression in video.expressions] == ["9", "11", "100"]
    assert video.listed_expressions == ("11", "100", "9")


def test_videos_and_expressions_that_cannot_be_used_are_skipped_with_a_warning(tmp_path):
    def video(**changes):
        return {**SPOKEN["videos"]["v"], **changes}

    expressions = {
        "0": {"exp": "the dog", "obj_id": "7"},
        "1": {"exp": " \t", "obj_id": "7"},
        "2": {"exp": "a ghost", "obj_id": "9"},
        "3": {"exp": "without truth"},
    }
    spoken = {
        "good": video(expressions=expressions),
        "mute": video(expressions={}),
        "blind": video(frames=[]),
        "elsewhere": video(),
    }
    meta = dict.fromkeys(("good", "mute", "absent"), META["videos"]["v"])
    meta["blind"] = {"objects": {"1": {"category": "dog"}, "7": {}, "300": {"category": "dog"}}}
    put(tmp_path / "meta.json", {"videos": meta})
    put(tmp_path / "meta_expressions.json", {"videos": spoken})
    index = read_index("mini-davis", tmp_path)
    assert list(index.videos) == ["good"]
    assert [e.id for e in index.videos["good"].expressions] == ["0"]
    assert list(index.videos["good"].objects) == ["1", "7"]  # object 1 has no expression, and stays
    told = "\n".join(index.warnings)
    for part in ("expression 1 is empty", "object 9", "expression 3 names no object", "mute has no expressions"):
        assert part in told
    for part in ("blind has no frames", "object 7 has no category", "object 300 cannot be", "absent is in no"):
        assert part in told
    assert "elsewhere" not in told
    assert all(str(tmp_path) in line and "\n" not in line for line in index.warnings)


def rle(mask: np.ndarray) -> dict:
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def mevis(folder: Path) -> Path:
    """Two overlapping objects, frame list out of order, a null, a run-length list, a no-target expression."""
    first, second = LABELS == 1, LABELS == 7
    second[1, 1:4, 2:6] = True
    listed = ["00010", "00000", "00005"]
    runs = {"size": [6, 8], "counts": [7, 2, 4, 2, 4, 2, 27]}  # columns 1 to 3, rows 1 and 2: `first`
    tracks = {"40": [rle(first[2]), runs, rle(first[1])], "9": [rle(second[2]), None, rle(second[1])]}
    spoken = {
        "3": {"exp": "Two Dogs", "obj_id": [0, 1], "anno_id": [40, 9]},
        "1": {"exp": "one", "obj_id": [1], "anno_id": [9]},
        "0": {"exp": "nobody", "obj_id": [], "anno_id": []},
    }
    put(folder / "meta_expressions.json", {"videos": {"v": {"vid_id": 5, "frames": listed, "expressions": spoken}}})
    put(folder / "mask_dict.json", tracks)
    draw_images(folder / "JPEGImages/v")
    return folder


@pytest.mark.parametrize("where", ["", "train", "Mini-MeViS/valid_u", "data/mini-mevis"])
def test_mevis_unions_through_rle(tmp_path, where):
    mevis(tmp_path / where)
    index = read_index("mini-mevis", tmp_path)
    video = index.videos["v"]
    assert video.frames == FRAMES
    assert video.objects == {"9": "unlabelled", "40": "unlabelled"}
    assert video.visible == {"9": FRAMES[1:], "40": FRAMES}
    assert [(e.id, e.objects) for e in video.expressions] == [("0", ()), ("1", ("9",)), ("3", ("9", "40"))]
    second = LABELS == 7
    second[1, 1:4, 2:6] = True
    assert np.array_equal(read_masks(index, "v", FRAMES, ["9"]), second)
    assert np.array_equal(read_masks(index, "v", FRAMES, ["9", "40"]), second | (LABELS == 1))
    nothing = read_masks(index, "v", FRAMES, [])
    assert nothing.shape == (3, 6, 8)
    assert not nothing.any()


def test_mevis_categories_and_disagreement(tmp_path):
    mevis(tmp_path)
    put(tmp_path / "categories.json", {"v": {"0": "cat", "1": "dog"}})
    index = read_index("mini-mevis", tmp_path)
    assert index.videos["v"].objects == {"9": "dog", "40": "cat"}
    assert {e.id: e.category for e in index.videos["v"].expressions} == {"0": "unlabelled", "1": "dog"}
    assert len(index.warnings) == 1
    assert "several categories (cat, dog)" in index.warnings[0]
    assert index.split().groups == {"all": ("cat", "dog")}
    put(tmp_path / "categories.json", {"v": {"0": "dog", "1": "dog"}})
    assert {e.category for e in read_index("mini-mevis", tmp_path).videos["v"].expressions} == {"dog"}


def test_mevis_faulty_tracks_are_told(tmp_path):
    mevis(tmp_path)
    tracks = json.loads((tmp_path / "mask_dict.json").read_text())
    put(tmp_path / "mask_dict.json", {"40": tracks["40"][:2], "9": tracks["9"]})
    index = read_index("mini-mevis", tmp_path)
    assert list(index.videos["v"].objects) == ["9"]
    assert "anno_id 40: 2 entries for 3 frames" in index.warnings[0]
    put(tmp_path / "mask_dict.json", {"40": tracks["40"]})
    assert any("anno_id 9: is missing" in line for line in read_index("mini-mevis", tmp_path).warnings)


def shuffled(value: object, rng: random.Random) -> object:
    if not isinstance(value, dict):
        return value
    keys = list(value)
    rng.shuffle(keys)
    return {key: shuffled(value[key], rng) for key in keys}


def test_golden_metadata_make_an_index_without_images_whatever_the_order_of_keys(tmp_path):
    meta, spoken = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("meta", "meta_expressions"))
    index = index_from_metadata("mini-ref-youtube-vos", meta, spoken, GOLDEN)
    assert index.warnings == ()
    assert list(index.videos) == sorted(meta["videos"])
    assert set(index.categories()) <= set(index.split().categories)
    for name, record in spoken["videos"].items():
        video = index.videos[name]
        assert video.frames == tuple(sorted(record["frames"]))
        assert video.listed_expressions == tuple(record["expressions"])
        for expression in video.expressions:
            entry = record["expressions"][expression.id]
            assert expression.text == " ".join(entry["exp"].lower().split())
            assert expression.category == meta["videos"][name]["objects"][entry["obj_id"]]["category"]
    rng = random.Random(3)
    other = index_from_metadata("builtin", shuffled(meta, rng), shuffled(spoken, rng), tmp_path)
    assert list(other.videos) == list(index.videos)
    assert other.metadata_hash() == index.metadata_hash()
    first = next(iter(spoken["videos"].values()))["expressions"]
    first[next(iter(first))]["exp"] = "something else"
    assert index_from_metadata("builtin", meta, spoken, tmp_path).metadata_hash() != index.metadata_hash()


def test_normalise():
    assert normalise("  A Bird,\n on   the Left. ") == "a bird, on the left."


def test_an_index_travels_to_another_process_without_pixels(tmp_path):
    index = read_index("mini-davis", davis(tmp_path))
    small = len(pickle.dumps(index))
    read_masks(index, "v", FRAMES * 50, ["7"])
    copy = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) == small
    assert copy == index
    assert np.array_equal(read_masks(copy, "v", FRAMES, ["7"]), LABELS == 7)


def refused(action, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_wrong_folders_name_what_was_looked_for(tmp_path):
    refused(lambda: read_index("mini-davis", tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(lambda: read_index("mini-davis", tmp_path), str(tmp_path), "meta.json", "Mini-DAVIS")
    refused(lambda: read_index("mini-mevis", tmp_path), "mask_dict", "Mini-MeViS")
    put(tmp_path / "meta.json", META)
    refused(
        lambda: read_index("mini-davis", tmp_path), "meta.json: found", "meta_expressions/train/meta_expressions.json"
    )


def test_wrong_files_are_named(tmp_path):
    davis(tmp_path)
    index = read_index("mini-davis", tmp_path)
    image = tmp_path / "JPEGImages/v/00005.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    refused(lambda: read_frame(index, "v", "00005"), "00005.jpg: truncated", "fetch it again")
    image.write_text("no image")
    refused(lambda: read_frame(index, "v", "00005"), "00005.jpg", "not an image")
    image.unlink()
    refused(lambda: read_frame(index, "v", "00005"), "00005.jpg", "no such image")
    mask = tmp_path / "Annotations/v/00005.png"
    mask.write_bytes(mask.read_bytes()[:60])
    refused(lambda: read_masks(index, "v", FRAMES, ["1"]), "00005.png")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(mask)
    refused(lambda: read_masks(index, "v", FRAMES, ["1"]), "another size")
    refused(lambda: read_masks(index, "v", FRAMES, ["2"]), "no object '2'")
    refused(lambda: read_masks(index, "w", FRAMES, ["1"]), "no video 'w'")
    put(tmp_path / "meta_expressions.json", {"videos": {"v": {"frames": FRAMES, "expressions": {"0": {"exp": "x"}}}}})
    refused(lambda: read_index("mini-davis", tmp_path), "no video with a usable expression", "part without truth")
    (tmp_path / "meta_expressions.json").write_text('{"videos": {')
    refused(lambda: read_index("mini-davis", tmp_path), "meta_expressions.json: not valid JSON")
    put(tmp_path / "meta_expressions.json", ["v"])
    refused(lambda: read_index("mini-davis", tmp_path), 'no table "videos"')
