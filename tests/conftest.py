"""Shared fixture: a few small videos on disk, in the YouTube layout, with a manifest of their first group.

Also sets Triton to its interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

# Before anything imports Triton, which reads this only once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fewref.episodes.manifest import write_manifest
from fewref.episodes.readers import read_index
from fewref.episodes.sampler import EpisodeProtocol, build_manifest
from fewref.splits import load_split

DATASET = "mini-ref-youtube-vos"
CATEGORIES = ("hat", "raccoon", "crocodile")
FRAMES = ("00000", "00005", "00010")
SIZE = (22, 30)


def write_video(root: Path, number: int, category: str) -> tuple[str, dict, dict]:
    """One video with two objects of a category: rectangles that move; returns name, meta and expression records."""
    name, rng = f"{category}{number}", np.random.default_rng([number, CATEGORIES.index(category)])
    places = rng.integers(0, 8, (2, 2)) + np.array([[0, 0], [10, 14]])
    for time, frame in enumerate(FRAMES):
        pixels = rng.integers(0, 100, (*SIZE, 3), dtype=np.uint8)
        labels = np.zeros(SIZE, dtype=np.uint8)
        for item, (y, x) in enumerate(places, 1):
            box = slice(y, y + 5), slice(x + time, x + time + 6)
            labels[box], pixels[box] = item, (200, 60 * item, 30)
        for folder, array, suffix in (("JPEGImages", pixels, ".jpg"), ("Annotations", labels, ".png")):
            path = root / "train" / folder / name / f"{frame}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(array)
            if suffix == ".png":
                image.putpalette([value for colour in range(256) for value in (colour, 0, 0)])
            image.save(path)
    objects = {str(item): {"category": category, "frames": list(FRAMES)} for item in (1, 2)}
    sentences = {
        str(item - 1): {"exp": f"the {category} number {item} of {number}", "obj_id": str(item)} for item in (1, 2)
    }
    return name, {"objects": objects}, {"expressions": sentences, "frames": list(FRAMES)}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """root, index, manifest, its path: 3 categories, 2 draws each, 2 query videos of 2 sentences, so 24 queries."""
    root = tmp_path_factory.mktemp("small") / DATASET
    meta, spoken = {}, {}
    for category in CATEGORIES:
        for number in range(4):
            name, meta_record, expression_record = write_video(root, number, category)
            meta[name], spoken[name] = meta_record, expression_record
    (root / "meta_expressions/train").mkdir(parents=True)
    (root / "train/meta.json").write_text(json.dumps({"videos": meta}))
    (root / "meta_expressions/train/meta_expressions.json").write_text(json.dumps({"videos": spoken}))
    index = read_index(DATASET, root)
    protocol = EpisodeProtocol("group", supports=2, support_frames=2)
    manifest = build_manifest(index, load_split(DATASET), "1", protocol)
    path = root.parent / "manifest.json"
    write_manifest(path, manifest)
    return SimpleNamespace(root=root, index=index, manifest=manifest, path=path)
