"""The picture: which query it shows, the pixels of its masks, its words, its bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fewref.benchmark import picture, strips
from fewref.benchmark.picture import ANSWER, BLACK, FADE, OUTLINE, TINT, TRUTH, draw, fit, overlay, wrap, write_picture
from fewref.benchmark.runner import run
from fewref.benchmark.strips import Band, Section, Strip, choose, collect, shown
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_query, load_truth
from fewref.episodes.readers import read_index
from fewref.episodes.types import Expression
from fewref.methods.base import Method, MethodInfo
from fewref.methods.controls import CopySupport, Empty, Oracle


def start(small, manifest, out, method=None, **options):
    method = method or Oracle()
    options = {"method_name": method.info.name, "workers": 0, "progress": False, **options}
    run(method=method, manifest=manifest, index=small.index, out=out, **options)
    return out


def cut(small, *places: int):
    return dataclasses.replace(small.manifest, episodes=tuple(small.manifest.episodes[place] for place in places))


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Two manifests with two methods each: a/oracle, a/empty, b/oracle, b/empty."""
    root = tmp_path_factory.mktemp("runs")
    manifests = {"a": cut(small, 0, 1), "b": cut(small, 2)}
    methods = {"oracle": Oracle, "empty": Empty}
    folders = {
        f"{part}/{name}": start(small, manifest, root / part / name, method(), scoring=["mevis", "davis"])
        for part, manifest in manifests.items()
        for name, method in methods.items()
    }
    indexes = {small.index.dataset: small.index}
    return SimpleNamespace(**manifests, folders=folders, indexes=indexes, all=list(folders.values()))


def smallest(manifest, skipped=()):
    keys = [(episode.id, query.id) for episode in manifest.episodes for query in episode.queries]
    digests = {hashlib.sha256(f"{e}/{q}".encode()).hexdigest(): (e, q) for e, q in keys if (e, q) not in skipped}
    return digests[sorted(digests)[0]]


def contains(image: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` (h,w,3) lies somewhere in `image`, pixel for pixel."""
    height, width = part.shape[:2]
    places = np.argwhere((image == part[0, 0]).all(axis=2))
    return any(np.array_equal(image[y : y + height, x : x + width], part) for y, x in places)


def test_sizes_are_whole_multiples_or_fitted():
    assert fit(96, 128) == (192, 256)
    assert fit(22, 30) == (220, 300)
    assert fit(480, 854) == (180, 320)
    assert fit(854, 480) == (240, 135)
    assert fit(240, 320) == (240, 320)
    assert fit(1, 5000) == (1, 320)


def test_pixels_of_an_enlarged_overlay():
    rng = np.random.default_rng(0)
    frame, mask = rng.integers(0, 256, (3, 24, 32), dtype=np.uint8), np.zeros((24, 32), bool)
    mask[8:16, 10:20] = True
    tile = overlay(frame, mask, ANSWER)
    assert tile.shape == (240, 320, 3)
    for y, x in ((0, 0), (23, 31), (4, 25)):  # far from the mask: a square of one colour, faded
        square = tile[10 * y : 10 * y + 10, 10 * x : 10 * x + 10].reshape(100, 3)
        assert (square == np.round(frame[:, y, x] * (1 - FADE) + 255 * FADE)).all()
    for y, x in ((9, 11), (12, 15), (14, 18)):  # well inside: tinted
        square = tile[10 * y : 10 * y + 10, 10 * x : 10 * x + 10].reshape(100, 3)
        assert (square == np.round(frame[:, y, x] * (1 - TINT) + np.array(ANSWER) * TINT)).all()
    rim = np.zeros((240, 320), bool)
    rim[80:160, 100:200] = True
    rim[80 + OUTLINE : 160 - OUTLINE, 100 + OUTLINE : 200 - OUTLINE] = False
    assert (tile[rim] == ANSWER).all()
    assert (tile[79, 99:201] == BLACK).all()
    assert (tile[160, 99:201] == BLACK).all()
    assert (tile[79:161, 99] == BLACK).all()


def test_a_reduced_mask_keeps_its_place_and_does_not_vanish():
    frame, mask = np.full((3, 480, 640), 90, np.uint8), np.zeros((480, 640), bool)
    mask[100:200, 300:400] = True
    inside = (overlay(frame, mask, TRUTH) != overlay(frame, ~mask & mask, TRUTH)).any(axis=2)
    assert inside.shape == (240, 320)
    ys, xs = np.nonzero(inside)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (49, 100, 149, 200)  # 50..99, 150..199 and the dark rim
    mask[:] = False
    mask[7, 9] = True  # a quarter of one pixel of the reduced mask
    assert tuple(overlay(frame, mask, TRUTH)[3, 4]) == TRUTH


def test_frames_shown_are_evenly_spaced_with_both_ends():
    assert shown(8, 4) == [0, 2, 5, 7]
    assert shown(3, 4) == [0, 1, 2]
    assert shown(1, 4) == [0]
    assert shown(9, 1) == [0]
    assert shown(5, 5) == [0, 1, 2, 3, 4]


def test_wrapping_breaks_between_words_and_inside_only_when_it_must():
    assert wrap("one two  three\nfour", 9, len) == ["one two", "three", "four"]
    assert wrap("a abcdefghijkl b", 5, len) == ["a", "abcde", "fghij", "kl b"]
    assert wrap("", 5, len) == [""]
    assert wrap("wide", 0, len) == ["w", "i", "d", "e"]


def test_the_rule_knows_keys_alone(runs):
    keys = {(episode.id, query.id) for episode in runs.a.episodes for query in episode.queries}
    first = smallest(runs.a)
    assert choose([keys, keys]) == first
    second = smallest(runs.a, {first})
    assert choose([keys - {first}, keys]) == choose([keys, keys - {first}]) == second
    assert choose([keys, set()]) is None


def test_strips_methods_and_scores(runs, small):
    order = [runs.folders[name] for name in ("b/empty", "a/oracle", "b/oracle", "a/empty")]
    strips, caption = collect(order, runs.indexes, 2, None)
    assert [strip.title for strip in strips] == [f"Group 1: {part.episodes[0].category}" for part in (runs.b, runs.a)]
    assert "scoring protocol mevis" in caption
    assert "SHA-256" in caption
    for strip, manifest, names in zip(
        strips, (runs.b, runs.a), (["empty", "oracle"], ["oracle", "empty"]), strict=True
    ):
        episode_id, query_id = smallest(manifest)
        assert episode_id in strip.subtitle
        assert query_id in strip.subtitle
        support, asked = strip.sections
        assert [band.label for band in asked.bands] == ["ground truth", *names]
        bands = {band.label: band for band in asked.bands}
        assert (bands["oracle"].score, bands["oracle"].notes) == ("J&F 100.0", ("J 100.0, F 100.0", "sees the truth"))
        assert (bands["empty"].score, bands["empty"].notes) == ("J&F 0.0", ("J 0.0, F 0.0", "no mask in any frame"))
        episode = next(episode for episode in manifest.episodes if episode.id == episode_id)
        place = [query.id for query in episode.queries].index(query_id)
        query, shot = episode.queries[place], episode.support.shots[0]
        truth = load_truth(small.index, query, episode.targets[place])[[0, 2]]
        assert asked.positions == (0, 2)
        assert asked.total == 3
        assert truth.any()
        np.testing.assert_array_equal(bands["ground truth"].masks, truth)
        np.testing.assert_array_equal(bands["oracle"].masks, truth)
        assert not bands["empty"].masks.any()
        np.testing.assert_array_equal(bands["empty"].frames, load_query(small.index, query).frames[[0, 2]])
        assert (support.sentence, asked.sentence) == (shot.expression.text, query.text)
        assert support.bands[0].masks.any()


def test_the_picture_holds_the_overlays_and_repeats_to_the_byte(runs, small, tmp_path):
    path = write_picture(tmp_path / "new" / "one.png", runs.all, runs.indexes)
    again = start(small, runs.b, tmp_path / "again")
    with matplotlib.rc_context({"font.size": 30, "text.hinting": "none", "savefig.dpi": 20, "image.origin": "lower"}):
        other = write_picture(tmp_path / "two.png", runs.all, runs.indexes, scoring="mevis")
    assert other.read_bytes() == path.read_bytes()
    with Image.open(path) as image:
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
        pixels = np.asarray(image)
    strips, _ = collect(runs.all, runs.indexes, 4, None)
    for strip in strips:
        for section in strip.sections:
            for band in section.bands:
                colour = ANSWER if band.label in ("oracle", "empty") else TRUTH
                for frame, mask in zip(band.frames, band.masks, strict=True):
                    assert contains(pixels, overlay(frame, mask, colour)), (strip.title, band.label)
    alone = [
        write_picture(tmp_path / name, [folder], runs.indexes, scoring="davis").read_bytes()
        for name, folder in (("three.png", runs.folders["b/oracle"]), ("four.png", again))
    ]
    assert alone[0] == alone[1]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_the_words_are_there_and_inside_the_page(runs):
    strips, caption = collect(runs.all, runs.indexes, 4, None)
    words = texts(draw(strips, caption))
    for strip in strips:
        assert strip.title in words
        assert f"“{strip.sections[1].sentence}”" in words
    for label, times in (("Support", 2), ("Query", 2), ("ground truth", 2), ("oracle", 2), ("J&F 100.0", 2)):
        assert words.count(label) == times
    assert words.count("frame 2 of 3") == 2
    assert "SHA-256" in " ".join(words)


def made_up(sentence: str, size: tuple[int, int], count: int = 1, label: str = "cma") -> Strip:
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (count, 3, *size), dtype=np.uint8)
    masks = np.zeros((count, *size), bool)
    masks[:, 2:9, 3:8] = True
    bands = (Band("ground truth", "", (), frames, masks), Band(label, "J&F 50.0", ("J 50.0, F 50.0",), frames, masks))
    return Strip("Group 2: dog", "x", (Section("Query", sentence, tuple(range(count)), count, bands),))


LONG = "the person who stands at the left, then walks behind the two parked cars and waves " * 4


@pytest.mark.parametrize(
    ("sentence", "size", "count", "label"),
    [
        (LONG, (854, 480), 1, "my_package.my_module:MyVeryLongMethodName"),
        ("左" * 200, (96, 128), 4, "cma"),
        ("der größte Hund – собака, $x_1$ and $y$", (480, 854), 2, "cma"),
        ("", (12, 10), 4, "cma"),
    ],
)
def test_no_word_leaves_its_column(sentence, size, count, label):
    strips = [made_up(sentence, size, count, label), made_up("a dog", size, count, label)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = draw(strips, "caption")
        canvas = picture.FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in figure.texts]
    width, height = canvas.get_width_height()
    said = "".join(text for text, _ in boxes).replace(" ", "")
    assert (f"“{sentence.strip()}”" if sentence else "(no sentence)").replace(" ", "") in said
    assert label in said
    middle = width / 2
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
        assert box.x1 <= (middle if box.x0 < middle else width), text
    labels = [
        box for text, box in boxes if box.x0 < picture.MARGIN * 2 + picture.LABELS and text in ("cma", "J&F 50.0")
    ]
    assert labels
    assert max(box.x1 for box in labels) <= picture.MARGIN * 2 + picture.LABELS


def test_a_sentence_that_no_font_can_write_gives_no_warning(small, tmp_path):
    episode = small.manifest.episodes[0]
    text = "最も大きい 🦄 $ hat $ \u0378"
    query, target = episode.queries[0], episode.targets[0]
    said: Expression = dataclasses.replace(target.expression, text=text)
    episode = dataclasses.replace(
        episode,
        queries=(dataclasses.replace(query, text=text),),
        targets=(dataclasses.replace(target, expression=said),),
    )
    manifest = dataclasses.replace(small.manifest, episodes=(episode,))
    folder = start(small, manifest, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        write_picture(tmp_path / "p.png", [folder], {small.index.dataset: small.index})


def test_several_shots_and_runs_that_differ_in_an_option(small, tmp_path):
    episode = small.manifest.episodes[0]
    other = small.manifest.episodes[1].support.shots
    support = dataclasses.replace(episode.support, shots=(*episode.support.shots, *other))
    manifest = dataclasses.replace(small.manifest, episodes=(dataclasses.replace(episode, support=support),))
    folders = [
        start(small, manifest, tmp_path / "right", CopySupport()),
        start(small, manifest, tmp_path / "empty", CopySupport(), text="empty"),
        start(small, manifest, tmp_path / "seed", CopySupport(seed=3)),
    ]
    (strip,), _ = collect(folders, {small.index.dataset: small.index}, 4, None)
    assert [section.heading for section in strip.sections] == ["Support 1/2", "Support 2/2", "Query"]
    notes = [band.notes[1:] for band in strip.sections[-1].bands[1:]]
    assert notes[1] == ("text: empty",)
    assert notes[0] != notes[2]
    assert all(note[0].startswith("run ") for note in (notes[0], notes[2]))


class Failing(Method):
    """Raises for one query."""

    info = MethodInfo("failing", "raises for one query")
    query = ""

    def adapt(self, support):
        pass

    def predict(self, query):
        assert query.id != self.query
        return Empty().predict(query)


def keep_rows(source, target, keep):
    shutil.copytree(source, target)
    lines = (source / "rows.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if keep((json.loads(line)["episode"], json.loads(line)["query"]))]
    (target / "rows.jsonl").write_text("".join(kept))
    return target


def test_unfinished_and_failed_queries_are_passed_over(runs, small, tmp_path):
    first = smallest(runs.b)
    second = smallest(runs.b, {first})
    whole = runs.folders["b/oracle"]
    part = keep_rows(runs.folders["b/empty"], tmp_path / "part", lambda key: key != first)
    method = Failing()
    method.query = second[1]
    failed = start(small, runs.b, tmp_path / "failed", method, scoring=["davis"])

    def asked(*folders) -> str:
        (strip,), _ = collect(folders, runs.indexes, 4, None)
        return strip.subtitle.split("query ")[1]

    assert asked(whole) == first[1]
    assert asked(whole, part) == asked(part, whole) == second[1]
    assert asked(whole, part, failed) == smallest(runs.b, {first, second})[1]


def refused(runs, tmp_path, folders, match, indexes=None, **options):
    with pytest.raises(InputError, match=match):
        write_picture(tmp_path / "p.png", folders, runs.indexes if indexes is None else indexes, **options)
    assert not (tmp_path / "p.png").exists()


def test_what_is_refused(runs, small, tmp_path):
    whole = runs.folders["b/oracle"]
    refused(runs, tmp_path, [tmp_path], "no run folder")
    refused(runs, tmp_path, [], "needs a run")
    refused(runs, tmp_path, [whole], "at least 1 frame", frames=0)
    refused(runs, tmp_path, [whole], f"is a run on {small.index.dataset}", indexes={})
    nothing = keep_rows(whole, tmp_path / "nothing", lambda key: False)
    refused(runs, tmp_path, [whole, nothing], "nothing: no query is finished in all of them")
    refused(runs, tmp_path, [whole], "not scored under 'danet-paper'", scoring="danet-paper")
    davis = start(small, runs.b, tmp_path / "davis", Empty(), scoring=["danet-paper"])
    refused(runs, tmp_path, [whole, davis], "davis: was not scored under 'mevis'")
    root = tmp_path / "other" / small.root.name
    shutil.copytree(small.root, root)
    spoken = root / "meta_expressions/train/meta_expressions.json"
    spoken.write_text(spoken.read_text().replace("number 1", "number one"))
    changed = {small.index.dataset: read_index(small.index.dataset, root)}
    refused(runs, tmp_path, [whole], "its metadata is not that of manifest", indexes=changed)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_picture(tmp_path / "file" / "p.png", [whole], runs.indexes)


def test_damaged_predictions_are_refused(runs, tmp_path):
    whole, (episode, query) = runs.folders["b/oracle"], smallest(runs.b)
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    place = [line["query"] for line in lines].index(query)

    def with_masks(name, masks):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        changed = [
            *lines[:place],
            *([{**lines[place], "masks": masks}] if masks is not None else []),
            *lines[place + 1 :],
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        return folder

    where = rf"prediction for {query} \(episode {episode}\)"
    refused(runs, tmp_path, [with_masks("gone", None)], f"{where} is not there")
    refused(runs, tmp_path, [with_masks("short", lines[place]["masks"][:2])], rf"{where} is \(2, 22, 30\)")
    refused(runs, tmp_path, [with_masks("no rle", [{"size": 3}])], f"{where} is no list of COCO RLE")


def test_a_picture_beyond_the_rasteriser_is_refused():
    with pytest.raises(InputError, match="too large; give fewer runs"):
        draw([made_up("a dog", (12, 10))] * 180, "caption")


def test_labels_name_the_adaptation():
    plain = {"method": "cma", "text": "right", "support": "right", "sees_truth": False, "checkpoint_sha256": "5"}
    strategies = (None, {"strategy": "finetune"}, {"strategy": "self-train"})
    headers = [{"run": "1", "defines": {**plain, "adaptation": strategy}} for strategy in strategies]
    assert strips._labels([*headers, headers[1]]) == [
        ("cma", ()),
        ("cma + finetune", ("run 1",)),
        ("cma + self-train", ("transductive",)),
        ("cma + finetune", ("run 1",)),
    ]
