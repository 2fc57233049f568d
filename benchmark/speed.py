"""How fast the parts of the suite are: every table compares two ways or more that are timed in one run.

`python benchmark/speed.py kernels|scoring|episode|scale` is the same as `fewref speed ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fewref.episodes.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and print the asked-for table; returns the exit code: 0, 2 (bad input)."""
    parser = argparse.ArgumentParser(prog="fewref speed", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="TABLE", required=True)
    kernels = _command(commands, "kernels", _kernels, "every operator on every backend, at four sizes")
    kernels.add_argument("--rounds", type=_count, default=3, help="of which the median counts (default %(default)s)")
    scoring = _command(commands, "scoring", _scoring, "J and F against the definition with OpenCV on the full frame")
    scoring.add_argument("--frames", type=_count, default=192, help="of each made-up video (default %(default)s)")
    scoring.add_argument("--seed", type=int, default=0, help="of its masks (default %(default)s)")
    episode = _command(commands, "episode", _episode, "an episode of CMA at the paper's size, against the plain way")
    episode.add_argument("--rounds", type=_count, default=1, help="of which the median counts (default %(default)s)")
    episode.add_argument("--bf16", action="store_true", help="a row for bfloat16, too")
    _command(commands, "scale", _scale, "processes; length of clips, supports, and number of episodes")
    for command in (kernels, episode, commands.choices["scale"]):
        command.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(arguments)
    try:
        print(options.table(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _command(commands, name: str, table, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.set_defaults(table=table)
    return command


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _kernels(options: argparse.Namespace) -> str:
    from fewref.benchmark.speed_kernels import kernels_table

    return kernels_table(options.rounds, options.quick)


def _scoring(options: argparse.Namespace) -> str:
    import torch

    from fewref.benchmark.speed_scoring import scoring_table

    if options.frames < 2:
        raise InputError(f"--frames {options.frames}: two processes share at least 2 frames")
    return scoring_table(options.frames, options.seed, device="cuda" if torch.cuda.is_available() else None)


def _episode(options: argparse.Namespace) -> str:
    from fewref.benchmark.speed_episode import episode_table

    return episode_table(options.rounds, options.quick, options.bf16)


def _scale(options: argparse.Namespace) -> str:
    from fewref.benchmark.speed_scale import scale_table

    return scale_table(options.quick)


if __name__ == "__main__":
    sys.exit(main())
