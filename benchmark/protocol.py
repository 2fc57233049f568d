"""Named protocols: which questions are asked, and how the answers are judged."""

from __future__ import annotations

from dataclasses import dataclass

from fewref.episodes.errors import InputError, near
from fewref.episodes.sampler import EpisodeProtocol, episode_protocol


@dataclass(frozen=True)
class Protocol:
    """The two sides of a protocol; `scoring` is a name of `fewref.benchmark.scoring.SCORING`."""

    name: str
    summary: str
    episodes: EpisodeProtocol
    scoring: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("group", "every query under five supports per category", episode_protocol("group"), "davis"),
        Protocol("random", "one-query episodes, 1000 for each of five seeds", episode_protocol("random"), "davis"),
        Protocol("cma-paper", "as hengliusky/Few_shot_RVOS tests", episode_protocol("cma-paper"), "cma-paper"),
        Protocol("danet-paper", "five supports, judged as scutpaul/DANet", episode_protocol("group"), "danet-paper"),
        Protocol("mevis", "five supports, judged as MeViS does", episode_protocol("group"), "mevis"),
    )
}


def get_protocol(name: str) -> Protocol:
    """A named protocol. Raises InputError, with near names, for an unknown one."""
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r} is unknown: {near(name, PROTOCOLS)}")
    return PROTOCOLS[name]
