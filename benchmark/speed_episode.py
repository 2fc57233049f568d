"""One episode of CMA in the paper's configuration, as the suite asks it and the plain way, in one process.

The plain way is how published scripts do it: query by query and window by window, each time with the support and the
sentence encoded anew, the plain definition of every operator, the masks of all queries of all decoder layers, and J and
F by their definition, twice per frame, when the network is done, without the huge pages that `fewref` asks for. Both
start from the same files and weights.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from fewref.benchmark.metrics import DAVIS_TOLERANCE
from fewref.benchmark.runner import run
from fewref.benchmark.speed_machine import forget_peak, machine_line, peak_bytes, without_huge_pages
from fewref.benchmark.speed_scoring import definition_scores, moving_masks
from fewref.episodes.load import load_query, load_support, load_truth
from fewref.episodes.manifest import Manifest
from fewref.episodes.readers import DatasetIndex, read_index
from fewref.episodes.sampler import EpisodeProtocol, build_manifest
from fewref.episodes.types import SupportSet
from fewref.kernels.dispatch import using
from fewref.methods.base import UNTRAINED
from fewref.methods.cma.adapter import CMA
from fewref.methods.cma.affinity import merge_shots
from fewref.methods.cma.inference import encode_shot, masks_at
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import select_queries
from fewref.methods.network_config import CONFIGS
from fewref.methods.query_inference import probabilities, resize_short_side
from fewref.splits import load_split

DATASET, CATEGORY = "mini-ref-youtube-vos", "hat"
SENTENCES = ("the hat that moves", "a striped hat in the middle of the picture", "hat")
Scores = dict[str, tuple[float, float]]  # query -> mean J and mean F


@dataclass(frozen=True)
class Sizes:
    """Of an episode: frames of the query's video and of the support clip, pixels, configuration, frames per window."""

    frames: int = 36
    support: int = 5
    image: tuple[int, int] = (360, 640)
    config: str = "paper"
    window: int = 10


QUICK = Sizes(frames=5, support=2, image=(48, 64), config="tiny", window=3)


def episode_table(rounds: int = 1, quick: bool = False, half: bool = False) -> str:
    """Time both ways, taking turns, and return a Markdown table.

    rounds: of which the median counts. quick: a tiny network and clip, for tests. half: a row for bfloat16, too.
    Raises RuntimeError where J or F of a query differ by 0.00005 or more, InputError without OpenCV.
    """
    sizes = QUICK if quick else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        index, manifest = write_episode(root / "data", sizes)
        method = CMA(weights=UNTRAINED, config=str(write_config(root / "cma.json", sizes)), window=sizes.window)
        # The thrifty ways first: what the plain one has freed stays with the process for a while.
        ways: dict[str, Callable[[], Scores]] = {"FewRef": lambda: suite_way(method, index, manifest, root)}
        if half:
            ways["FewRef, bf16"] = lambda: suite_way(method, index, manifest, root, "bf16")
        ways["plain"] = lambda: plain_way(method, index, manifest)
        runs = [{name: measure(way) for name, way in ways.items()} for _ in range(rounds)]
        timed = {name: [run[name] for run in runs] for name in ("plain", *ways)}
        peaks = {name: _in_new_process(window_peak, root, sizes, name == "plain") for name in ("plain", "FewRef")}
    plain, fast = (timed[name][0][2] for name in ("plain", "FewRef"))
    worst = max(abs(a - b) for query in plain for a, b in zip(plain[query], fast[query], strict=True))
    if worst >= 0.5e-4:
        raise RuntimeError(f"J or F of a query differ by {worst:.6f}; the speed means nothing")
    return "\n".join([_markdown(timed, peaks), "", _note(sizes, rounds, worst), "", machine_line()])


def measure(way: Callable[[], Scores]) -> tuple[float, int, Scores]:
    """Seconds, the most bytes of the process meanwhile, and the result of a call."""
    forget_peak()
    start = time.perf_counter()
    scores = way()
    return time.perf_counter() - start, peak_bytes(), scores


def suite_way(method: CMA, index: DatasetIndex, manifest: Manifest, root: Path, precision: str = "fp32") -> Scores:
    """As `fewref run`: one call of the runner, with a process that scores."""
    method.precision = precision
    with tempfile.TemporaryDirectory(dir=root) as out:
        done = run(method=method, method_name="cma", manifest=manifest, index=index, out=Path(out), progress=False)
    method.precision = "fp32"
    if done.failed:
        raise RuntimeError(f"the network failed: {done.rows[0].error}")
    scores = {row.query: row.scores["davis"] for row in done.rows}
    return {name: (float(np.mean(score["j"])), float(np.mean(score["f"]))) for name, score in scores.items()}


@torch.inference_mode()
def plain_way(method: CMA, index: DatasetIndex, manifest: Manifest) -> Scores:
    """As the head of this file says, under the plain definition of every operator."""
    (episode,) = manifest.episodes
    scores = {}
    with using("reference"), without_huge_pages():
        support = load_support(index, episode.support)
        for query, target in zip(episode.queries, episode.targets, strict=True):
            frames = load_query(index, query).frames
            windows = [frames[start : start + method.window] for start in range(0, len(frames), method.window)]
            masks = np.concatenate([plain_masks(method, window, query.text, support) for window in windows])
            truth = load_truth(index, query, target)
            pairs = [(m[None].astype(float), t[None].astype(float)) for m, t in zip(masks, truth, strict=True)]
            judged = [[plain_scores(*pair) for _ in range(2)][1] for pair in pairs]
            scores[query.id] = tuple(np.mean(judged, axis=0).tolist())
    return scores


def plain_scores(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """J and F of one frame, float64 (1,H,W)."""
    j, f = definition_scores(mask > 0.5, truth > 0.5, DAVIS_TOLERANCE)
    return j.item(), f.item()


def plain_masks(method: CMA, frames: np.ndarray, sentence: str, support: SupportSet) -> np.ndarray:
    """Masks bool (T,H,W) of one window, frames uint8 (T,3,H,W), with nothing known of any other."""
    net, side = method.network, method.short_side
    shots = [
        encode_shot(net, shot.frames, shot.masks, method.encode_text(shot.expression.text), side)
        for shot in support.shots
    ]
    clip = normalise(torch.tensor(resize_short_side(frames, side)))[None]
    size = clip.shape[-2:]
    padding = torch.zeros(1, len(frames), *size, dtype=torch.bool)
    output = net(clip, padding, torch.tensor([size]), method.encode_text(sentence), merge_shots(shots))
    chosen = select_queries(output["pred_logits"])[0].item()
    return masks_at(probabilities(output["pred_masks"][0, :, chosen], size), frames.shape[-2:]).numpy()


def window_peak(root: Path, sizes: Sizes, plainly: bool) -> int:
    """Most bytes of this process, which should be a new one, for the first window of the first query alone."""
    index = read_index(DATASET, root / "data")
    (episode,) = build_episode(index, sizes).episodes
    method = CMA(weights=UNTRAINED, config=str(root / "cma.json"), window=sizes.window)
    support, query = load_support(index, episode.support), episode.queries[0]
    query = load_query(index, replace(query, clip=replace(query.clip, frames=query.clip.frames[: sizes.window])))
    if plainly:
        with torch.inference_mode(), using("reference"):
            plain_masks(method, query.frames, query.text, support)
    else:
        method.adapt(support)
        method.predict(query)
    return peak_bytes()


def _in_new_process(call: Callable[..., int], *given: object) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def write_config(path: Path, sizes: Sizes) -> Path:
    """A configuration with a tokenizer that is at hand: which words random weights are given does not matter."""
    config = json.loads((CONFIGS / f"cma_{sizes.config}.json").read_text(encoding="utf-8"))
    config["text"]["tokenizer"] = str(CONFIGS / "tiny_tokenizer.json")
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def write_episode(root: Path, sizes: Sizes) -> tuple[DatasetIndex, Manifest]:
    """Two made-up videos of one category, and the episode that asks about the longer one under the other."""
    spoken, meta = {}, {}
    for seed, (name, count) in enumerate((("query", sizes.frames), ("support", sizes.support))):
        frames = write_video(root / "train", name, count, sizes.image, seed)
        sentences = SENTENCES if name == "query" else SENTENCES[:1]
        meta[name] = {"objects": {"1": {"category": CATEGORY, "frames": frames}}}
        expressions = {str(k): {"exp": text, "obj_id": "1"} for k, text in enumerate(sentences)}
        spoken[name] = {"expressions": expressions, "frames": frames}
    for path, videos in (
        ("train/meta.json", meta),
        ("meta_expressions/train/meta_expressions.json", spoken),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps({"videos": videos}), encoding="utf-8")
    index = read_index(DATASET, root)
    return index, build_episode(index, sizes)


def build_episode(index: DatasetIndex, sizes: Sizes) -> Manifest:
    """A manifest of the one episode."""
    protocol = EpisodeProtocol("group", supports=5, support_frames=sizes.support)
    manifest = build_manifest(index, load_split(DATASET), "1", protocol)
    wanted = [episode for episode in manifest.episodes if len(episode.queries) == len(SENTENCES)]
    return replace(manifest, episodes=tuple(wanted[:1]))


def write_video(folder: Path, name: str, count: int, size: tuple[int, int], seed: int) -> list[str]:
    """Frames of a drifting, textured blob and their masks; returns the frames' names."""
    rng = np.random.default_rng(seed)
    masks = moving_masks(count, *size, seed)
    texture = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    names = [f"{5 * k:05}" for k in range(count)]
    for k, (frame, mask) in enumerate(zip(names, masks, strict=True)):
        pixels = np.where(mask[..., None], np.roll(texture[0] // 2 + 100, 2 * k, 1), texture[1] // 3)
        label = Image.fromarray(mask.astype(np.uint8))
        label.putpalette([0, 0, 0, 255, 255, 255])
        for kind, image in (("JPEGImages", Image.fromarray(pixels.astype(np.uint8))), ("Annotations", label)):
            path = folder / kind / name / f"{frame}{'.jpg' if kind == 'JPEGImages' else '.png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return names


def _markdown(timed: dict[str, list[tuple[float, int, Scores]]], peaks: dict[str, int]) -> str:
    columns = ("way", "seconds", "ratio", "most memory, GB", "for one window, GB", "J", "F")
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    first = median(seconds for seconds, _, _ in timed["plain"])
    for name, runs in timed.items():
        seconds, peak = (median(column) for column in list(zip(*runs, strict=True))[:2])
        j, f = np.mean(list(runs[0][2].values()), axis=0)
        window = f"{peaks[name] / 1e9:.2f}" if name in peaks else "-"
        cells = (name, f"{seconds:.1f}", f"{first / seconds:.1f}", f"{peak / 1e9:.2f}", window, f"{j:.4f}", f"{f:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _note(sizes: Sizes, rounds: int, worst: float) -> str:
    return (
        f"CMA, configuration {sizes.config}, random weights: {len(SENTENCES)} sentences about a video of "
        f"{sizes.frames} frames in windows of {sizes.window}, a support clip of {sizes.support} frames, "
        f"{sizes.image[0]}x{sizes.image[1]}; decoding and scoring included; median of {rounds}. J and F of a query "
        f"differ by {worst:.6f} at most between the two ways in float32. Memory is that of a whole process, with the "
        f"weights: that of the run, and of a new one that answers {sizes.window} frames and one sentence. The plain "
        "way does without huge pages."
    )
