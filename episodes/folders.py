"""Where the parts of a dataset lie on disk: every spelling of the folders that is in circulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewref.episodes.errors import InputError

# Names of the dataset's own folder, per layout; the first is the one that messages recommend.
NAMES = {
    "youtube": ("mini-ref-youtube-vos", "Mini-Ref-YouTube-VOS"),
    "sail": ("mini-ref-sail-vos", "Mini-Ref-SAIL-VOS", "mini-SAIL-VOS"),
    "davis": ("mini-davis", "Mini-DAVIS"),
    "mevis": ("mini-mevis", "Mini-MeViS"),
}
PARTS = {"youtube": ("train",), "sail": ("train",), "davis": ("train", "valid"), "mevis": ("train", "valid_u", "valid")}
IMAGES = ("JPEGImages", "Images")


@dataclass(frozen=True)
class Tree:
    """One part (train, valid, ...) of a dataset. Images and masks need not exist as long as no pixels are asked for.

    meta: objects and categories (`meta.json`; `categories.json` or None beside a mask file). expressions: sentences and
    frame lists. images: folder of `<video>/<frame>.<jpg|bmp|png>`. masks: folder of `<video>/<frame>.png`, or the file
    `mask_dict.json` (MeViS).
    """

    base: Path
    meta: Path | None
    expressions: Path
    images: Path
    masks: Path

    @property
    def mask_file(self) -> bool:
        """Whether the masks are RLE strings in one JSON file instead of palette PNG files."""
        return self.masks.suffix == ".json"

    def describe(self) -> str:
        """The spelling that was found, relative to the dataset folder."""
        files = [self.meta, self.expressions, self.images, self.masks]
        return ", ".join(str(file.relative_to(self.base)) for file in files if file)


def find_trees(layout: str, root: Path) -> list[Tree]:
    """The parts of the dataset at `root`, which is the dataset's own folder or one above it (or above its `data`).

    Raises InputError naming what was looked for where nothing complete is found.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; point --data-root at the folder that holds {NAMES[layout][0]}")
    incomplete: list[str] = []
    for base in _bases(layout, root):
        trees = list(_mask_file_trees(base)) if layout == "mevis" else []
        trees = trees or list(_png_trees(layout, base, incomplete))
        if trees:
            return trees
    if incomplete:
        raise InputError(incomplete[0])
    names = " or ".join(NAMES[layout])
    wanted = "train/{meta_expressions,mask_dict}.json or " if layout == "mevis" else ""
    raise InputError(
        f"{root}: no dataset of the {layout} layout here; looked for {wanted}meta.json and meta_expressions.json, in "
        f"this folder, in {names} and in data/; point --data-root at the folder that holds them"
    )


def metadata_tree(root: Path, mask_file: bool) -> Tree:
    """The customary places below `root` for metadata that were not read from there."""
    root = Path(root)
    if mask_file:
        return _mask_file_tree(root, root / "train")
    expressions = root / "meta_expressions/train/meta_expressions.json"
    return Tree(root, root / "train/meta.json", expressions, root / "train/JPEGImages", root / "train/Annotations")


def _bases(layout: str, root: Path) -> Iterator[Path]:
    yield root
    for name in NAMES[layout]:
        for base in (root / name, root / "data" / name):
            if base.is_dir():
                yield base


def _mask_file_trees(base: Path) -> Iterator[Tree]:
    for folder in (*(base / part for part in PARTS["mevis"]), base):
        if (folder / "meta_expressions.json").is_file() and (folder / "mask_dict.json").is_file():
            yield _mask_file_tree(base, folder)


def _mask_file_tree(base: Path, folder: Path) -> Tree:
    categories = _first(base, [str((folder / "categories.json").relative_to(base)), "categories.json"])
    images = folder / "JPEGImages"
    return Tree(base, categories, folder / "meta_expressions.json", images, folder / "mask_dict.json")


def _png_trees(layout: str, base: Path, incomplete: list[str]) -> Iterator[Tree]:
    for part in PARTS[layout]:
        metas = [f"{part}/meta.json", f"{part}/{part}.json", "meta.json", f"{part}.json"]
        own = [f"meta_expressions/{part}/meta_expressions.json", f"{part}/meta_expressions.json"]
        shared = ["meta_expressions/meta_expressions.json", "meta_expressions.json"] if part == "train" else []
        meta, expressions = _first(base, metas), _first(base, own + shared)
        if meta and expressions:
            images = _first(base, [f"{part}/{name}" for name in IMAGES] + list(IMAGES)) or meta.parent / IMAGES[0]
            masks = _first(base, [f"{part}/Annotations", "Annotations"]) or meta.parent / "Annotations"
            yield Tree(base, meta, expressions, images, masks)
        elif part == "train" and (meta or expressions):
            wanted = own + shared if meta else metas
            incomplete.append(f"{meta or expressions}: found, but beside it none of {', '.join(wanted)} (below {base})")


def _first(base: Path, names: list[str]) -> Path | None:
    return next((base / name for name in names if (base / name).exists()), None)
