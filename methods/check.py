"""`describe NAME --check`: hold any method to the contract, on two small episodes made in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fewref.episodes.errors import InputError
from fewref.episodes.types import Clip, Expression, Prediction, Query, Shot, SupportSet
from fewref.methods.base import Method, MethodInfo

SENTENCES = ("a dog", "the dog that moves to the right", "a dog")


@dataclass(frozen=True)
class Check:
    """One line of the pass table."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """A support, a query with pixels, and the query's truth, bool (T,H,W)."""

    support: SupportSet
    query: Query
    truth: np.ndarray


class WatchedQuery(Query):
    """A query that notes every attribute that a method reads of it."""

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


def check_method(cls: type[Method], **options: object) -> list[Check]:
    """Run a method class on two synthetic episodes, small moving shapes, and hold the answers to the contract.

    options: keyword arguments of the class (weights, device, ...). Returns a list of `Check`, one per rule; only the
    first ones where the method cannot be built. No file is read but the method's own. Raises InputError where the
    method itself does (no such checkpoint, ...).
    """
    checks: list[Check] = []

    def check(name: str, rule: Callable[[], str]) -> bool:
        try:
            detail = rule()
        except InputError:
            raise
        except Exception as error:  # whatever a method raises is a failed rule
            detail = " ".join(f"{type(error).__name__}: {error}".split())
        checks.append(Check(name, not detail, detail))
        return not detail

    first, second = make_case(0, "dog", (48, 64)), make_case(1, "cat", (41, 57))
    if not check("info is declared and the class can be built", lambda: _built(cls, options)):
        return checks

    def answer(case: Case, method: Method | None = None, adapt: bool = True) -> Prediction:
        method = method or cls(**options)
        if adapt:
            method.adapt(case.support)
        return _predict(method, case)

    def same(expected: Prediction, got: Prediction, otherwise: str) -> str:
        return "" if _equal(expected, got) else otherwise

    def refit() -> str:
        used = cls(**options)
        answer(first, used)
        return same(answer(second), answer(second, used), "adapt(A), adapt(B) differs from a fresh adapt(B)")

    def repeat() -> str:
        method = cls(**options)
        before = answer(first, method)
        other = dataclasses.replace(make_case(2, "dog", (48, 64)), support=first.support)
        answer(other, method, adapt=False)
        return same(before, answer(first, method, adapt=False), "the same query after another one differs")

    def together() -> str:
        method = cls(**options)
        if not method.shares_clips:
            return ""  # asked one by one
        method.adapt(first.support)
        queries = [dataclasses.replace(first.query, id=f"{number}", text=text) for number, text in enumerate(SENTENCES)]
        alone, got = [method.predict(query) for query in queries], method.predict_clip(queries)
        equal = len(got) == len(alone) and all(map(_equal, alone, got))
        return "" if equal else "predict_clip differs from predict, one query after another"

    check("answers with a Prediction of this query", lambda: _kind(answer(first), first))
    check("masks: bool, one per frame, at the original size", lambda: _masks(answer(first), first))
    check("input masks: none, or bool and one per frame", lambda: _input_masks(answer(first), first))
    check("confidence: a number in [0,1]", lambda: _confidence(answer(first)))
    check("equal seeds give equal answers", lambda: same(answer(first), answer(first), "two runs of one seed differ"))
    check("inputs are left as they were", lambda: _untouched(cls(**options), first))
    check("reads of a query its id, clip, text and frames alone", lambda: _reads(cls(**options), first))
    check("asks for the truth only if it says so", lambda: _truth(cls))
    check("a second adapt forgets the first", refit)
    check("predict does not change the state", repeat)
    check("sentences asked together get the answers that they get alone", together)
    shapes = {
        "an odd size, unlike the support's": _resized(second, first.support),
        "a clip of one frame": _cut(first, 1),
        "a clip longer than the window": _stretched(first, 2 * cls(**options).window + 1),
        "supports of different sizes and lengths": _two_shots(first, second),
        "empty support masks and no sentence": _blank(first),
        "no sentence in the query": dataclasses.replace(first, query=dataclasses.replace(first.query, text="")),
    }
    for name, case in shapes.items():
        check(name, lambda case=case: _valid(answer(case), case))
    return checks


def make_case(number: int, category: str, size: tuple[int, int], frames: int = 4) -> Case:
    """A support and a query of one category: a disc that moves over noise, deterministic in `number`; size (H,W)."""

    def clip(role: int) -> tuple[Clip, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([number, role])
        height, width = size
        pixels = rng.integers(0, 120, (frames, 3, height, width), dtype=np.uint8)
        y, x = np.mgrid[:height, :width]
        radius, middle, start = height // 5, rng.integers(height // 4, height // 2), width // 4
        masks = np.stack([(y - middle) ** 2 + (x - start - 3 * t) ** 2 <= radius**2 for t in range(frames)])
        for channel, value in enumerate(rng.integers(130, 256, 3)):
            pixels[:, channel][masks] = value
        name = f"{category}-{number}-{role}"
        return Clip("check", name, tuple(f"{t:05d}" for t in range(frames))), pixels, masks

    text = f"the {category} that moves to the right"
    support_clip, support_frames, support_masks = clip(0)
    shot = Shot(support_clip, Expression("0", text, ("1",), category), support_frames, support_masks)
    query_clip, query_frames, truth = clip(1)
    query = Query(f"{query_clip.video}:0", query_clip, text, query_frames)
    return Case(SupportSet(category, (shot,)), query, truth)


def _predict(method: Method, case: Case, query: Query | None = None) -> Prediction:
    if method.info.sees_truth:
        method.reveal(case.truth)
    return method.predict(query or case.query)


def _built(cls: type[Method], options: dict) -> str:
    info = getattr(cls, "info", None)
    if not isinstance(info, MethodInfo):
        return "no `info`, a MethodInfo"
    if info.kind not in ("method", "control") or not info.name or not info.summary:
        return "info needs a name, a summary and the kind 'method' or 'control'"
    method = cls(**options)
    if method.window < 1:
        return f"window is {method.window}"
    count = method.parameters()
    return "" if isinstance(count, int) and count >= 0 else f"parameters() gives {count!r}"


def _kind(prediction: Prediction, case: Case) -> str:
    if not isinstance(prediction, Prediction):
        return f"predict returned {type(prediction).__name__}"
    return "" if prediction.query == case.query.id else f"answers {prediction.query!r}, asked {case.query.id!r}"


def _masks(prediction: Prediction, case: Case) -> str:
    frames, _, height, width = case.query.frames.shape
    return mask_fault(prediction.masks, "masks", (frames, height, width))


def _input_masks(prediction: Prediction, case: Case) -> str:
    if prediction.input_masks is None:
        return ""
    return mask_fault(prediction.input_masks, "input_masks", (len(case.query.frames), None, None))


def mask_fault(masks: object, name: str, shape: tuple[int | None, ...]) -> str:
    """What is wrong with `masks`, which must be a bool array of this shape (None: any length); "" if nothing is."""
    if not isinstance(masks, np.ndarray):
        return f"{name} is {type(masks).__name__}, not a NumPy array"
    if masks.dtype != bool:
        return f"{name} is {masks.dtype}, not bool"
    wanted = len(masks.shape) == len(shape) and all(
        length in (None, got) for length, got in zip(shape, masks.shape, strict=True)
    )
    return "" if wanted else f"{name} has shape {masks.shape}, not {shape}"


def _confidence(prediction: Prediction) -> str:
    return confidence_fault(prediction.confidence)


def confidence_fault(confidence: object) -> str:
    """What is wrong with a confidence, which must be a number in [0,1]; "" if nothing is."""
    number = isinstance(confidence, (int, float, np.number)) and not isinstance(confidence, bool)
    return "" if number and 0 <= confidence <= 1 else f"confidence is {confidence!r}, not a number in [0,1]"


def prediction_fault(prediction: object, query: Query) -> str:
    """The first thing that is wrong with an answer to `query` (pixels loaded); "" if nothing is."""
    case = Case(SupportSet("", ()), query, np.zeros(0, dtype=bool))
    rules = (_kind, _masks, _input_masks, lambda given, _: _confidence(given))
    return next((fault for rule in rules if (fault := rule(prediction, case))), "")


def _valid(prediction: Prediction, case: Case) -> str:
    return prediction_fault(prediction, case.query)


def _equal(one: Prediction, other: Prediction) -> bool:
    def same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
        return left is right if left is None or right is None else np.array_equal(left, right)

    masks = same(one.masks, other.masks) and same(one.input_masks, other.input_masks)
    return masks and (one.query, one.confidence) == (other.query, other.confidence)


def _untouched(method: Method, case: Case) -> str:
    arrays = {"query frames": case.query.frames}
    for shot in case.support.shots:
        arrays |= {"support frames": shot.frames, "support masks": shot.masks}
    before = {name: array.copy() for name, array in arrays.items()}
    method.adapt(case.support)
    _predict(method, case)
    changed = [name for name, array in arrays.items() if not np.array_equal(array, before[name])]
    for name in changed:
        arrays[name][...] = before[name]
    return f"changed: {', '.join(changed)}" if changed else ""


def _reads(method: Method, case: Case) -> str:
    query = WatchedQuery(**{field.name: getattr(case.query, field.name) for field in dataclasses.fields(Query)})
    method.adapt(case.support)
    _predict(method, case, query)
    read = object.__getattribute__(query, "__dict__").get("_read", set())
    extra = sorted(read - {field.name for field in dataclasses.fields(Query)})
    return f"read {', '.join(extra)}" if extra else ""


def _truth(cls: type[Method]) -> str:
    defines = cls.reveal is not Method.reveal
    if defines == cls.info.sees_truth:
        return ""
    return "defines reveal without info.sees_truth" if defines else "info.sees_truth without reveal"


def _cut(case: Case, frames: int) -> Case:
    return _take(case, list(range(frames)))


def _stretched(case: Case, frames: int) -> Case:
    return _take(case, [index % len(case.truth) for index in range(frames)])


def _take(case: Case, picked: list[int]) -> Case:
    clip = dataclasses.replace(case.query.clip, frames=tuple(f"{place:05d}" for place in range(len(picked))))
    query = dataclasses.replace(case.query, clip=clip, frames=case.query.frames[picked])
    return dataclasses.replace(case, query=query, truth=case.truth[picked])


def _resized(case: Case, support: SupportSet) -> Case:
    return dataclasses.replace(case, support=support)


def _two_shots(first: Case, second: Case) -> Case:
    (other,) = _cut_support(second, 3)
    return dataclasses.replace(first, support=SupportSet(first.support.category, (*first.support.shots, other)))


def _cut_support(case: Case, frames: int) -> tuple[Shot, ...]:
    return tuple(
        dataclasses.replace(
            shot,
            clip=dataclasses.replace(shot.clip, frames=shot.clip.frames[:frames]),
            frames=shot.frames[:frames],
            masks=shot.masks[:frames],
        )
        for shot in case.support.shots
    )


def _blank(case: Case) -> Case:
    shots = tuple(
        dataclasses.replace(
            shot, expression=dataclasses.replace(shot.expression, text=""), masks=np.zeros_like(shot.masks)
        )
        for shot in case.support.shots
    )
    return dataclasses.replace(case, support=SupportSet(case.support.category, shots))
