"""Which frames of a video make a training clip, as ReferFormer chooses them."""

from __future__ import annotations

import random

NEAR = 3  # frames: the largest distance of the two neighbours


def sample_clip(length: int, centre: int, frames: int, rng: random.Random) -> list[int]:
    """Positions of `frames` frames out of 0..length-1, ascending: the centre, one frame shortly before it, one shortly
    after it, and the rest from anywhere outside these; frames of short videos repeat.

    frames: 1, which draws nothing, or at least 3; centre: 0..length-1, ValueError otherwise. With `random.Random(seed)`
    the positions are those that upstream draws after `random.seed(seed)`. Videos of fewer than (frames-3)/2 frames, at
    which upstream stops, repeat more often. Source: `wjn922/ReferFormer`, specification section 8.
    """
    if not 0 <= centre < length:
        raise ValueError(f"centre {centre} is no position in a video of {length} frames")
    if frames == 1:
        return [centre]
    if frames < 3:
        raise ValueError(f"a clip has 1 frame or at least 3, not {frames}")
    before, after = rng.randint(1, NEAR), rng.randint(1, NEAR)
    chosen = [centre, max(0, centre - before), min(length - 1, centre + after)]
    everywhere = list(range(length))
    outside = everywhere[: min(chosen)] + everywhere[max(chosen) :]  # with the last one again, as upstream
    wanted = frames - len(chosen)
    if len(outside) > wanted:
        chosen += [outside[place] for place in rng.sample(range(len(outside)), wanted)]
    elif length >= wanted:
        chosen += rng.sample(everywhere, wanted)
    else:
        rounds = (wanted - 1) // length
        chosen += rng.sample(everywhere, wanted - rounds * length) + everywhere * rounds
    return sorted(chosen)
