"""How fast the parts of the suite are, each against a plain transcription of what it computes, in one run.

`python benchmark/speed.py scoring` prints frames per second of the scorer in one and in two processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fewref.benchmark.speed_scoring import scoring_table
from fewref.episodes.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and print the asked-for table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="speed.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("scoring", help="J and F against the definition with OpenCV on the full frame")
    scoring.add_argument("--frames", type=int, default=192)
    scoring.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.frames < 2:
        parser.error("--frames must be at least 2")
    try:
        print(scoring_table(options.frames, options.seed))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
