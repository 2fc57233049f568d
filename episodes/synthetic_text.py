"""Sentences about a synthetic scene: what is true of which object, and how one says it.

A fact is a pair (kind, value) such as ("colour", "red") or ("relation", ("above", 2)). It holds, does not hold, or is
too close to call. A description is used only if all its facts hold for every object meant and, for every other object
of the same category, one of them clearly does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from fewref.episodes.synthetic_scene import COLOURS, MOTIONS, SIZES, Scene

PLACES = ("left", "right", "top", "bottom")
RELATIONS = ("in front of", "behind", "left of", "right of", "above", "below")
FORMS = {  # which facts a description of each kind joins; earlier forms are drawn more often
    "colour": (("colour",), ("colour",), ("size", "colour"), ("size",)),
    "place": (("place",), ("colour", "place"), ("size", "place")),
    "motion": (("motion",), ("colour", "motion"), ("size", "motion")),
    "relation": (("relation",), ("colour", "relation")),
}
WORDS = {
    ("size", "small"): ("small", "little"),
    ("size", "big"): ("big", "large"),
    ("place", "left"): ("on the left", "on the left side"),
    ("place", "right"): ("on the right", "on the right side"),
    ("place", "top"): ("at the top", "in the upper part"),
    ("place", "bottom"): ("at the bottom", "in the lower part"),
    ("motion", "left"): ("moving left", "moving to the left", "going left"),
    ("motion", "right"): ("moving right", "moving to the right", "going right"),
    ("motion", "up"): ("moving up", "going up"),
    ("motion", "down"): ("moving down", "going down"),
    ("motion", "still"): ("standing still", "that does not move"),
}
NUMBERS = {2: ("the two", "both"), 3: ("the three", "all three"), 4: ("the four", "all four")}


def holds(scene: Scene, n: int, kind: str, value: object) -> bool | None:
    """Whether a fact is true of the scene's n-th object; None where it is too close to call."""
    thing = scene.things[n]
    if kind == "place":
        axis = 0 if value in ("left", "right") else 1
        where = thing.centres[:, axis] / scene.visible.shape[3 - axis]
        where = 1 - where if value in ("right", "bottom") else where
        return True if where.max() < 0.47 else False if where.min() > 0.53 else None
    if kind != "relation":
        return getattr(thing, kind) == value
    relation, other = value
    if relation in ("in front of", "behind"):
        overlap = (scene.amodal[n] & scene.amodal[other]).sum((1, 2))
        if not overlap.any():
            return False
        enough = np.median(overlap) >= 0.06 * np.median(scene.amodal[n].sum((1, 2)))
        return (n > other) == (relation == "in front of") if enough else None
    axis = 0 if relation in ("left of", "right of") else 1
    ahead = (scene.things[other].centres - thing.centres)[:, axis] / thing.radii
    ahead = -ahead if relation in ("right of", "below") else ahead
    return True if ahead.min() > 0.8 else False if ahead.max() < 0.0 else None


def descriptions(scene: Scene, meant: tuple[int, ...]) -> Iterator[tuple[str, tuple]]:
    """Every (kind, facts) that singles out the objects `meant` (indices, one category) among all of their category."""
    category = scene.things[meant[0]].category
    rivals = [n for n, thing in enumerate(scene.things) if thing.category == category and n not in meant]
    names = [thing.category for thing in scene.things]
    landmarks = [n for n, name in enumerate(names) if name != category and names.count(name) == 1]
    values = {"colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES, "motion": tuple(MOTIONS)}
    values["relation"] = tuple(product(RELATIONS, landmarks))
    verdict = {
        (kind, value): [holds(scene, n, kind, value) for n in (*meant, *rivals)]
        for kind, options in values.items()
        for value in options
    }
    true = {kind: [v for v in options if all(verdict[kind, v][: len(meant)])] for kind, options in values.items()}
    for kind, forms in FORMS.items():
        for form in forms:
            for chosen in product(*(true[part] for part in form)):
                facts = tuple(zip(form, chosen, strict=True))
                others = zip(*(verdict[fact][len(meant) :] for fact in facts), strict=True)
                if all(False in answers for answers in others):
                    yield kind, facts


def describe(
    rng: np.random.Generator, scene: Scene, meant: tuple[int, ...], weights: dict[str, float], used: set[str]
) -> str | None:
    """A sentence that is true of the objects `meant` and of no other, not in `used` (which it joins); None if none is.

    weights: how often each kind (colour, place, motion, relation) is wanted where there is a choice.
    """
    known = list(descriptions(scene, meant))
    for _ in range(12):
        kinds = [kind for kind in weights if any(kind == k for k, _ in known)]
        if not kinds:
            return None
        share = np.cumsum([weights[kind] for kind in kinds])
        kind = kinds[int(np.searchsorted(share, rng.random() * share[-1], side="right"))]
        options = [facts for k, facts in known if k == kind]
        facts = dict(options[int(len(options) * rng.random() ** 1.5)])
        names = [thing.category for thing in scene.things]
        text = say(rng, names[meant[0]], facts, len(meant), names)
        if text not in used:
            used.add(text)
            return text
    return None


def say(rng: np.random.Generator, category: str, facts: dict, count: int, names: list[str]) -> str:
    """Words for a description. names: the categories of the scene's objects, which relations point into."""
    before = [_word(rng, "size", facts["size"])] if "size" in facts else []
    after = [_word(rng, kind, facts[kind]) for kind in ("place", "motion") if kind in facts]
    if "relation" in facts:
        relation, other = facts["relation"]
        side = {"left of": "to the left of", "right of": "to the right of"}
        after.append(f"{side.get(relation, relation)} the {names[other].replace('_', ' ')}")
    if "colour" in facts:
        tail = count == 1 and not after and rng.random() < 0.15
        (after if tail else before).append(f"that is {facts['colour']}" if tail else facts["colour"])
    noun = category.replace("_", " ")
    phrase = " ".join((*before, noun, *after))
    if count > 1:
        every = f"every {phrase}"
        plural = " ".join((*before, noun + "s", *after)).replace("that does not", "that do not")
        number = NUMBERS[count]
        return (every, f"{number[0]} {plural}", f"{number[1]} {plural}", f"the {plural}")[rng.integers(4)]
    article = ("the", "the", "an" if phrase[0] in "aeiou" else "a", "")[rng.integers(4)]
    return f"{article} {phrase}".strip()


def _word(rng: np.random.Generator, kind: str, value: str) -> str:
    options = WORDS[kind, value]
    return options[int(len(options) * rng.random())]
