"""One index per dataset, built from its metadata; frames and masks are decoded when asked for.

Nothing is written into the dataset's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fewref.episodes.errors import InputError, near, read_json
from fewref.episodes.folders import Tree, find_trees, metadata_tree
from fewref.episodes.metadata import Video, parse_mevis, parse_youtube, silent_videos
from fewref.episodes.rle import read_mask_file, read_rle, union
from fewref.episodes.types import canonical_json
from fewref.splits import Split, complete, load_split

SUFFIXES = (".jpg", ".bmp", ".png", ".jpeg")
CACHED_CLIPS = 4  # the queries of a video follow each other, so a few decoded clips save most of the decoding


@dataclass(frozen=True)
class DatasetIndex:
    """All videos of a dataset, sorted by name. found: the spelling of the folders; warnings: what was left out and why.

    trees: video -> the part of the dataset it lies in.
    """

    dataset: str
    root: Path
    layout: str
    videos: dict[str, Video]
    found: str
    warnings: tuple[str, ...] = ()
    trees: dict[str, Tree] = field(default_factory=dict, repr=False)
    _tracks: dict[Path, dict] = field(default_factory=dict, repr=False, compare=False)
    _clips: dict = field(default_factory=dict, repr=False, compare=False)

    def metadata_hash(self) -> str:
        """SHA-256 (hex) of the sorted metadata: equal on every machine and for every order of keys in the files."""
        videos = {}
        for name, video in self.videos.items():
            record = {**vars(video), "expressions": [vars(expression) for expression in video.expressions]}
            del record["listed_frames"], record["listed_expressions"]
            videos[name] = record
        return hashlib.sha256(canonical_json(videos).encode()).hexdigest()

    def categories(self) -> tuple[str, ...]:
        """Sorted names of the categories of all objects that the metadata know."""
        return tuple(sorted({name for video in self.videos.values() for name in video.objects.values()}))

    def split(self) -> Split:
        """The dataset's split; where no category list is published, with the categories of the metadata."""
        return complete(load_split(self.dataset), self.categories())

    def __getstate__(self) -> dict:
        """Without the decoded pixels, which another process makes for itself."""
        return {**self.__dict__, "_clips": {}, "_tracks": {}}


def read_index(dataset: str, root: Path) -> DatasetIndex:
    """Read the metadata of the dataset at `root` (its own folder or one above), `mask_dict.json` included; no image.

    Raises InputError for an unknown dataset, a folder without it, or files that do not have its schema.
    """
    layout = load_split(dataset).layout
    videos, homes, warnings, masks, metas, spoken = {}, {}, [], {}, {}, set()
    trees = find_trees(layout, Path(root))
    for tree in trees:
        meta, expressions = read_json(tree.meta) if tree.meta else {}, read_json(tree.expressions)
        if tree.mask_file:
            masks[tree.masks] = read_mask_file(tree.masks)
            part, notes = parse_mevis(expressions, meta, masks[tree.masks], tree.expressions)
        else:
            part, notes = parse_youtube(meta, expressions, tree.meta, tree.expressions)
            metas[tree.meta] = meta
            spoken |= expressions["videos"].keys()
        warnings += notes
        for name, video in part.items():
            if name in videos:
                warnings.append(f"{tree.expressions}: video {name} is also in {homes[name].expressions}; skipped")
                continue
            videos[name], homes[name] = video, tree
    warnings += silent_videos(metas, spoken)
    if not videos:
        reason = f" (first reason: {warnings[0]})" if warnings else ""
        raise InputError(f"{trees[0].expressions}: no video with a usable expression{reason}")
    where = f"{trees[0].base}: {'; '.join(tree.describe() for tree in trees)}"
    return DatasetIndex(dataset, Path(root), layout, dict(sorted(videos.items())), where, tuple(warnings), homes, masks)


def index_from_metadata(dataset: str, meta: dict, expressions: dict, root: Path) -> DatasetIndex:
    """An index from parsed annotation files (for mevis: `meta` = {video: {obj_id: category}}), with or without pixels.

    Pixels, if ever asked for, are looked for in the customary folders below `root`. Raises InputError as `read_index`.
    """
    layout = load_split(dataset).layout
    tree = metadata_tree(root, mask_file=layout == "mevis")
    if tree.mask_file:
        videos, warnings = parse_mevis(expressions, meta, None, tree.expressions)
    else:
        videos, warnings = parse_youtube(meta, expressions, tree.meta, tree.expressions)
        warnings += silent_videos({tree.meta: meta}, set(expressions["videos"]))
    trees = dict.fromkeys(videos, tree)
    return DatasetIndex(dataset, Path(root), layout, videos, "metadata only", tuple(warnings), trees)


def get_video(index: DatasetIndex, video: str) -> Video:
    """The video of that name. Raises InputError for an unknown one."""
    if video not in index.videos:
        raise InputError(f"{index.root}: {index.dataset} has no video {video!r}: {near(video, index.videos)[:200]}")
    return index.videos[video]


def frame_path(index: DatasetIndex, video: str, frame: str) -> Path:
    """The image file of a frame; where none of the known suffixes exists, the customary name. Raises InputError."""
    get_video(index, video)
    stem = index.trees[video].images / video / frame
    paths = [stem.with_name(frame + suffix) for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[1] if index.layout == "sail" else paths[0])


def mask_path(index: DatasetIndex, video: str, frame: str) -> Path:
    """The mask file of a frame (of MeViS: the one file with all masks), which need not exist. Raises InputError."""
    get_video(index, video)
    tree = index.trees[video]
    return tree.masks if tree.mask_file else tree.masks / video / f"{frame}.png"


def read_frame(index: DatasetIndex, video: str, frame: str) -> np.ndarray:
    """Decode a frame: uint8 (H,W,3) RGB. Raises InputError naming the file if it is missing, truncated or no image."""
    return decode_frame(frame_path(index, video, frame))


def read_frames(index: DatasetIndex, video: str, frames: Sequence[str]) -> np.ndarray:
    """Decode a clip: uint8 (T,H,W,3) RGB, to be left unchanged (the last few clips are kept for their next reader).

    Raises InputError as `read_frame`, and for frames of different sizes.
    """

    def decode() -> np.ndarray:
        pixels = {frame: read_frame(index, video, frame) for frame in dict.fromkeys(frames)}
        return _stack([pixels[frame] for frame in frames], index, video, frames)

    return _kept(index, ("frames", video, tuple(frames)), decode)


def read_labels(index: DatasetIndex, video: str, frames: Sequence[str]) -> np.ndarray:
    """Decode PNG masks: uint8 (T,H,W), 0 background, k object k; to be left unchanged. No file: all background.

    Raises InputError for unreadable files and frames of different sizes.
    """

    def decode() -> np.ndarray:
        labels = {frame: _frame_labels(index, video, frame) for frame in dict.fromkeys(frames)}
        return _stack([labels[frame] for frame in frames], index, video, frames)

    return _kept(index, ("labels", video, tuple(frames)), decode)


def read_masks(index: DatasetIndex, video: str, frames: Sequence[str], objects: Sequence[str]) -> np.ndarray:
    """Masks bool (T,H,W): the union of the objects' masks; no objects, or a frame without a mask: empty.

    Sources: pixel == object id of palette PNG files; for MeViS the decoded COCO RLE entries of all anno_ids.
    Raises InputError for unreadable files, unknown objects and frames of different sizes.
    """
    known = get_video(index, video).objects
    for number in objects:
        if number not in known:
            raise InputError(f"{index.trees[video].expressions}: video {video} has no object {number!r}")
    if index.trees[video].mask_file:
        masks = [_union(index, video, frame, objects) for frame in frames]
        return _stack(masks, index, video, frames)
    labels = read_labels(index, video, frames)
    return np.isin(labels, [int(number) for number in objects])


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) from the head of an image file. Raises InputError naming the file."""
    width, height = _open(path, decode=False).size
    return height, width


def open_image(path: Path) -> Image.Image:
    """A fully decoded image. Raises InputError naming the file if it is missing, truncated or no image."""
    return _open(path, decode=True)


def decode_frame(path: Path) -> np.ndarray:
    """An image file as uint8 (H,W,3) RGB. Raises InputError naming the file."""
    return np.asarray(open_image(path).convert("RGB"))


def decode_labels(path: Path) -> np.ndarray:
    """Pixel values of a mask file, uint8 (H,W): palette and grey values as they are, other modes through a palette."""
    image = open_image(path)
    try:
        return np.asarray(image if image.mode in ("P", "L") else image.convert("P"))
    except ValueError:
        raise InputError(f"{path}: not a palette mask (mode {image.mode}); fetch it again") from None


def _open(path: Path, decode: bool) -> Image.Image:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; fetch the dataset again or mend --data-root") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image, or cut off in its head; fetch it again") from None
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, ValueError, struct.error)
        reason = getattr(error, "strerror", None) or "truncated or damaged"
        raise InputError(f"{path}: {reason}; fetch it again") from None


def _frame_labels(index: DatasetIndex, video: str, frame: str) -> np.ndarray:
    path = mask_path(index, video, frame)
    if not path.is_file():
        return np.zeros(image_size(frame_path(index, video, frame)), np.uint8)
    labels = decode_labels(path)
    record = index.videos[video]
    if index.layout == "sail" and stands_for_one(labels, record):
        return np.where(labels == 255, int(next(iter(record.objects))), 0).astype(np.uint8)
    return labels


def stands_for_one(labels: np.ndarray, video: Video) -> bool:
    """SAIL-VOS: whether the pixels, all 0 or 255, mean the one object of the video, whatever its id (fault 9)."""
    return len(video.objects) == 1 and bool(np.isin(labels, (0, 255)).all())


def track_rle(index: DatasetIndex, video: str, frame: str, number: str) -> dict | None:
    """The RLE of a MeViS anno_id at a frame, None where its mask is empty; bytes `counts`, as pycocotools takes it.

    Entry j of a track belongs to the j-th frame in the order of the file, which need not be sorted.
    Raises InputError for an unknown frame.
    """
    path, listed = index.trees[video].masks, index.videos[video].listed_frames
    if frame not in listed:
        raise InputError(f"{index.trees[video].expressions}: video {video} has no frame {frame!r}")
    if path not in index._tracks:
        index._tracks[path] = read_mask_file(path)
    return read_rle(index._tracks[path][number][listed.index(frame)])


def _union(index: DatasetIndex, video: str, frame: str, objects: Sequence[str]) -> np.ndarray:
    rles = [rle for number in objects if (rle := track_rle(index, video, frame, number))]
    return union(rles) if rles else np.zeros(image_size(frame_path(index, video, frame)), bool)


def _kept(index: DatasetIndex, key: tuple, make: object) -> np.ndarray:
    """The clip of that key, decoded at most once while it is among the last few."""
    clip = index._clips.get(key)
    if clip is None:
        clip = make()
        clip.setflags(write=False)
        index._clips[key] = clip
        for old in list(index._clips)[:-CACHED_CLIPS]:
            index._clips.pop(old, None)
    return clip


def _stack(pixels: list[np.ndarray], index: DatasetIndex, video: str, frames: Sequence[str]) -> np.ndarray:
    if not pixels:
        raise InputError(f"{index.root}: video {video}: no frames asked for")
    for frame, array in zip(frames, pixels, strict=True):
        if array.shape != pixels[0].shape:
            sizes = f"{array.shape[:2]} in place of {pixels[0].shape[:2]}"
            path = frame_path(index, video, frame)
            raise InputError(f"{path}: image or mask is of another size than the first, {sizes}; fetch the video again")
    return np.stack(pixels)
