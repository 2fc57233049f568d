"""Writes a small benchmark of synthetic video in the layouts of the four datasets (spec protocol 1, 2, 6, 7).

Every file is a function of the seed alone: each video draws from a generator keyed by its own name, so that neither the
number of workers nor what else is written changes a byte.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fewref.episodes.errors import InputError, near
from fewref.episodes.synthetic_layouts import Job, write_metadata, write_video
from fewref.episodes.synthetic_scene import Cast, generator
from fewref.splits import load_split

YOUTUBE = tuple(load_split("builtin").categories)
PRETRAIN = tuple(load_split("builtin-pretrain").categories)
CATEGORIES = {
    "youtube": YOUTUBE,
    "pretrain": PRETRAIN,
    "sail": tuple(load_split("builtin-sail").categories),
    "davis": ("bird", "camel", "car", "cow", "dog", "person"),
    "mevis": ("boat", "cat", "dog", "elephant", "horse", "truck"),
}
LAYOUTS = ("youtube", "sail", "davis", "mevis")
FOLDERS = dict(zip(LAYOUTS, ("mini-ref-youtube-vos", "mini-ref-sail-vos", "mini-davis", "mini-mevis"), strict=True))
FOLDERS |= {"pretrain": "pretrain"}
LOOKS = {name: number for number, name in enumerate((*YOUTUBE, *PRETRAIN), 1)} | {"car": YOUTUBE.index("sedan") + 1}


def write_synthetic(
    root: Path,
    seed: int = 0,
    videos_per_category: int = 10,
    layouts: tuple[str, ...] = LAYOUTS,
    size: tuple[int, int] = (96, 128),
    frames: int = 8,
    workers: int = 2,
) -> None:
    """Write `<root>/mini-ref-youtube-vos`, `mini-ref-sail-vos`, `mini-davis` and `mini-mevis`, or some of them.

    youtube: 48 categories, `videos_per_category` videos each; in a video all objects are of one group (id modulo 4). An
    object's "frames" in meta.json are those that show it. sail: 8 videos per class; only the object that the sentence
    means is in the masks. davis: 7 videos per category, four sentences per object. mevis: 7 videos per category; since
    that layout has no categories, `categories.json` beside it holds {video: {object id: category}}.

    pretrain: as youtube, but 48 other categories, whose looks no benchmark has, and more that only the support can tell
    apart: always two distractors, mostly of the same colour, and often a single object of the video's category.

    size: (H, W) in pixels, 64 or more; frames: per video, 4 or more (every eighth youtube video has half as many more).
    The same arguments (workers apart) give the same bytes. Raises InputError for a value out of range, for a `root`
    that holds something already and for one that cannot be written; nothing half-written is left behind.
    """
    _check(layouts, {"videos per category": (videos_per_category, 1), "frames": (frames, 4), "workers": (workers, 1)})
    _check((), {"height": (size[0], 64), "width": (size[1], 64)})
    root = Path(root).resolve()
    partial = None
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise InputError(f"{root}: exists and is not an empty folder; choose another one or remove it")
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
        for layout in layouts:
            jobs = _jobs(partial / FOLDERS[layout], layout, seed, videos_per_category, tuple(size), frames)
            write_metadata(partial / FOLDERS[layout], jobs, _run(jobs, workers))
        partial.chmod(0o755)
        os.replace(partial, root)
    except OSError as error:
        raise InputError(f"{root}: cannot be written ({error.strerror}); choose another output folder") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _check(layouts: tuple[str, ...], limits: dict[str, tuple[int, int]]) -> None:
    for layout in layouts:
        if layout not in FOLDERS:
            raise InputError(f"layout {layout!r} is unknown; {near(layout, FOLDERS)}")
    for option, (value, least) in limits.items():
        if value < least:
            raise InputError(f"{option} {value} is too small; give {least} or more")


def _jobs(folder: Path, layout: str, seed: int, videos_per_category: int, size: tuple[int, int], frames: int) -> list:
    """The videos of one dataset, in the order in which the metadata lists them."""
    per_category = {"sail": 8, "davis": 7, "mevis": 7}.get(layout, videos_per_category)
    jobs, names = [], set()
    for category in CATEGORIES[layout]:
        for k in range(per_category):
            key, index = f"{seed}/{layout}/{category}/{k}", len(jobs)
            digest = hashlib.sha256(key.encode()).hexdigest()
            name = next(digest[i : i + 8] for i in range(56) if digest[i : i + 8] not in names)
            names.add(name)
            cast = _cast(layout, category, k, key)
            written = "youtube" if layout == "pretrain" else layout
            longer = frames // 2 if written == "youtube" and index % 8 == 7 else 0
            jobs.append(Job(folder, written, name, key, index, cast, frames + longer, size))
    return jobs


def _cast(layout: str, category: str, k: int, key: str) -> Cast:
    rng = generator(f"{key}/cast")
    group = (LOOKS[category] - 1) % 4
    known, categories = PRETRAIN if layout == "pretrain" else YOUTUBE, CATEGORIES[layout]
    same_group = [name for name in known if (LOOKS[name] - 1) % 4 == group and LOOKS[name] != LOOKS[category]]
    rest = [name for name in categories if name != category] if layout in ("davis", "mevis") else same_group
    others = [(rest[i], LOOKS[rest[i]]) for i in rng.permutation(len(rest))[:2]]
    look = (category, LOOKS[category])
    if layout == "pretrain":
        return Cast(look, tuple(others), primaries=1 + k % 2, alike=0.9)
    count = {"youtube": 2 if rng.random() < 0.2 else 1, "sail": 2 - k % 2, "davis": (1, 0, 1, 0)[k % 4], "mevis": 1}
    primaries = {"youtube": 2, "sail": 1 + k % 2, "davis": (1, 2, 2, 1)[k % 4], "mevis": 3}[layout]
    leaver = layout == "youtube" and rng.random() < 0.03
    return Cast(look, tuple(others[: count[layout]]), primaries, distinct_colours=layout == "davis", leaver=leaver)


def _run(jobs: list[Job], workers: int) -> list[dict]:
    """The metadata of every video, in order; its files are on disk then."""
    if workers == 1:
        return [write_video(job) for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write_video, jobs, chunksize=4))
