"""Training episodes: which clips a step sees, and their pixels as one batch.

Everything random follows from (seed, step, item) alone, so that a continued training, another number of threads or of
processes sees the same samples.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from fewref.benchmark.recipe import TrainOptions
from fewref.episodes.draws import generator
from fewref.episodes.errors import InputError
from fewref.episodes.readers import DatasetIndex, read_frame, read_masks
from fewref.episodes.sampler import window
from fewref.episodes.transforms import ClipSample, augment, make_sample, resize_frame, resize_masks
from fewref.episodes.types import Expression
from fewref.methods.batch import Batch, collate, with_tracking
from fewref.methods.referformer.clip_sampling import sample_clip
from fewref.methods.tf2.pairing import keep_object, neighbours

SUPPORT_TRIES = 50
AHEAD = 2  # steps prepared in advance
Pools = Mapping[str, Sequence[tuple[str, Expression]]]


@dataclass
class PixelCache:
    """Decoded frames and masks, kept up to `limit` bytes, the least recently used dropped first.

    size: (H, W) to bring them to, None to keep their own.
    """

    index: DatasetIndex
    limit: int
    size: tuple[int, int] | None = None
    _kept: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def frames(self, video: str, names: Sequence[str]) -> np.ndarray:
        """uint8 (T,H,W,3). Raises InputError as `read_frame`, and for frames of different sizes."""
        return self._stack(video, [self._get((video, name), self._frame) for name in names])

    def masks(self, video: str, names: Sequence[str], objects: tuple[str, ...]) -> np.ndarray:
        """bool (T,H,W), the union of the objects. Raises InputError as `read_masks`."""
        return self._stack(video, [self._get((video, name, objects), self._mask) for name in names])

    def _frame(self, video: str, name: str) -> np.ndarray:
        frame = read_frame(self.index, video, name)
        return resize_frame(frame, self.size) if self.size else frame

    def _mask(self, video: str, name: str, objects: tuple[str, ...]) -> np.ndarray:
        masks = read_masks(self.index, video, [name], objects)
        return (resize_masks(masks, self.size) if self.size else masks)[0]

    def _get(self, key: tuple, make: Callable[..., np.ndarray]) -> np.ndarray:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = make(*key)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._bytes += pixels.nbytes
            while self._bytes > self.limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels

    def _stack(self, video: str, pixels: list[np.ndarray]) -> np.ndarray:
        if len({array.shape for array in pixels}) > 1:
            raise InputError(f"{self.index.root}: video {video}: frames have different sizes; fetch the video again")
        return np.stack(pixels)


def group_videos(pools: Pools) -> dict[str, dict[str, tuple[Expression, ...]]]:
    """category -> video -> its expressions of that category, for categories with the two videos an episode needs.

    Raises InputError where no category has them.
    """
    grouped: dict[str, dict[str, tuple[Expression, ...]]] = {}
    for category, samples in pools.items():
        videos: dict[str, tuple[Expression, ...]] = {}
        for video, expression in samples:
            videos[video] = (*videos.get(video, ()), expression)
        if len(videos) > 1:
            grouped[category] = dict(sorted(videos.items()))
    if not grouped:
        raise InputError("no base category has two videos, one for the query and one for the support; add videos")
    return grouped


@dataclass(frozen=True)
class EpisodeSource:
    """Draws training episodes (specification of the protocol, 3.1 to 3.3, with faults 6, 7 and 17 mended).

    videos: from `group_videos`. The classes come in rounds, each a new shuffle of all of them; with faithful="upstream"
    each class fills `samples_per_class` episodes before the next begins.
    """

    cache: PixelCache
    videos: dict[str, dict[str, tuple[Expression, ...]]]
    options: TrainOptions
    seed: int

    def category(self, step: int, item: int) -> str:
        """The class of item `item` (from 0) of step `step` (from 0)."""
        names, position = list(self.videos), step * self.options.batch + item
        if self.options.faithful == "upstream":
            return names[position // self.options.samples_per_class % len(names)]
        turn, place = divmod(position, len(names))
        return names[generator(self.seed, "classes", turn).permutation(len(names))[place]]

    def tracks(self, step: int) -> bool:
        """Whether a step has tracking images."""
        return generator(self.seed, "tracking", step).random() < self.options.tracking

    def episode(self, step: int, item: int) -> tuple[ClipSample, ...]:
        """Query clip of one item, with support_frames its support clip, and where `tracks` says so its tracking images.

        Each is augmented on its own. Raises InputError for unreadable pixels.
        """
        rng = generator(self.seed, step, item)
        category = self.category(step, item)
        videos = list(self.videos[category])
        query = videos.pop(int(rng.integers(len(videos))))
        expression = self._expression(rng, category, query)
        places = self._places(rng, query, self.options.clip_frames, self.options.clips == "scattered")
        clips = [self._clip(query, expression, places)]
        if self.options.support_frames:
            clips.append(self._support(rng, category, query, expression, videos))
        if self.tracks(step):
            clips.append(self._tracking(query, expression, places))
        whole_words = self.options.faithful == "fixed"
        return tuple(augment(self.options.augment, clip, rng, whole_words) for clip in clips)

    def _support(
        self, rng: np.random.Generator, category: str, query: str, expression: Expression, videos: list[str]
    ) -> ClipSample:
        """A clip of another video of the category (or, as an easy start, of the query's) which shows its object."""
        own = self.options.own_support > 0 and rng.random() < self.options.own_support
        for _ in range(SUPPORT_TRIES):
            video = query if own else videos[int(rng.integers(len(videos)))]
            shown = expression if own else self._expression(rng, category, video)
            clip = self._clip(video, shown, self._places(rng, video, self.options.support_frames))
            if self.options.faithful == "upstream" or clip.masks[len(clip.masks) // 2].any():
                return clip
        raise InputError(f"{self.cache.index.root}: no clip of {category} shows its object; check the masks")

    def _expression(self, rng: np.random.Generator, category: str, video: str) -> Expression:
        expressions = self.videos[category][video]
        return expressions[int(rng.integers(len(expressions)))]

    def _places(self, rng: np.random.Generator, video: str, wanted: int, scattered: bool = False) -> list[int]:
        count = len(self.cache.index.videos[video].frames)
        centre = int(rng.integers(count))
        if scattered:
            return sample_clip(count, centre, wanted, random.Random(int(rng.integers(2**62))))
        return window(count, wanted, centre)

    def _clip(self, video: str, expression: Expression, places: Sequence[int]) -> ClipSample:
        names = [self.cache.index.videos[video].frames[place] for place in places]
        frames = self.cache.frames(video, names)
        masks = self.cache.masks(video, names, expression.objects)
        return make_sample(frames, masks, expression.text, swapped_clamp=self.options.faithful == "upstream")

    def _tracking(self, video: str, expression: Expression, places: Sequence[int]) -> ClipSample:
        """A neighbour of every frame with all but the object black (specification of TF2, section 3)."""
        clip = self._clip(video, expression, neighbours(places, len(self.cache.index.videos[video].frames)))
        frames = keep_object(clip.frames.transpose(0, 3, 1, 2), clip.masks)
        return replace(clip, frames=np.ascontiguousarray(frames.transpose(0, 2, 3, 1)))


def batches(
    source: EpisodeSource, tokenizer: Callable, first: int, last: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) for steps first..last-1; the next steps are prepared in threads meanwhile.

    Of `world` processes, number `rank` gets the items i with i mod world = rank.
    """
    items = range(rank, source.options.batch, world)
    waiting: deque = deque()
    pool = ThreadPoolExecutor(source.options.workers)
    try:
        for step in range(first, last + AHEAD):
            if step < last:
                waiting.append((step, [pool.submit(source.episode, step, item) for item in items]))
            if waiting and step >= first + AHEAD:
                ready, futures = waiting.popleft()
                episodes = [future.result() for future in futures]
                yield ready, _batch(episodes, source.tracks(ready), tokenizer)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batch(episodes: list[tuple[ClipSample, ...]], tracked: bool, tokenizer: Callable) -> Batch:
    if not tracked:
        return collate(episodes, tokenizer)
    return with_tracking(collate([clips[:-1] for clips in episodes], tokenizer), [clips[-1] for clips in episodes])
