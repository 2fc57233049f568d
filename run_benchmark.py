"""The command line of FewRef: parsing only; what a command calls is in `fewref.benchmark.calls`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _import_this_checkout() -> None:
    """As a script: take this folder off the import path, where it would hide a distribution called `kernels`, and make
    `fewref` this very checkout, installed or not."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    if "fewref" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "fewref", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
        )
        sys.modules["fewref"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fewref"])


if not __package__:  # also in the processes that score, which import the main script again
    _import_this_checkout()

from fewref.benchmark import calls  # noqa: E402
from fewref.episodes.errors import InputError, near  # noqa: E402


class Parser(argparse.ArgumentParser):
    """Complains in one line, with near names."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            raise InputError(f"{name} {value!r} is unknown: {near(str(value), map(str, action.choices))}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (faults found), 2 (bad input), 3 (queries failed), 130 (stopped)."""
    # PyTorch reads this when it first needs memory: huge pages for large tensors make what is bound by memory 1.3 to
    # 1.8 times as fast on a CPU, where else most of the time goes into page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        parser = build_parser()
        options, unknown = parser.parse_known_args(arguments)
        if options.call is calls.speed:
            options.rest, unknown = (
                [*unknown, *options.rest],
                [],
            )  # argparse does not count options in front to the rest
        if unknown:
            known = [name for name in options.parser._option_string_actions if name.startswith("--")]
            hint = f": {near(unknown[0], known)}" if unknown[0].startswith("-") else ""
            raise InputError(f"unknown argument {unknown[0]!r}{hint}; see `{options.parser.prog} --help`")
        return options.call(options) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    """All commands with their options."""
    parser = Parser(prog="fewref", description="Few-shot referring video object segmentation: benchmark suite.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _demo(commands)
    _run(commands)
    _train(commands)
    _results(commands)
    _episodes(commands)
    _data(commands)
    _methods(commands)
    _speed(commands)
    return parser


def _command(commands, name: str, call, summary: str, **kwargs) -> Parser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", **kwargs)
    parser.set_defaults(call=call, parser=parser)
    return parser


def _demo(commands) -> None:
    demo = _command(commands, "demo", calls.demo, "CMA and the controls on the built-in data: tables and a picture")
    demo.add_argument("--out", type=Path, help="folder of runs, tables, picture (default runs/demo, runs/leaderboard)")
    demo.add_argument("--draws", type=int, default=1, help="support draws asked, of five (default %(default)s)")
    demo.add_argument("--queries", type=int, help="asked per episode, evenly spaced (default 12; leaderboard 8)")
    demo.add_argument("--leaderboard", action="store_true", help="every method and adaptation that is shipped")
    demo.add_argument("--retrain", action="store_true", help="train the shipped checkpoints again first (hours)")


def _dataset_options(parser: Parser, group: str = "all") -> None:
    parser.add_argument("--dataset", default="builtin", help="name of a dataset, see `list` (default %(default)s)")
    parser.add_argument("--data-root", type=Path, help="its folder; the built-in data are written where absent")
    parser.add_argument("--group", "--groups", default=group, help="1..4, joined by commas, or all (%(default)s)")


def _episode_options(parser: Parser, shots: dict | None = None) -> None:
    parser.add_argument("--protocol", default="group", help="named protocol, see `list` (default %(default)s)")
    parser.add_argument("--shots", **(shots or {"type": int, "help": "support clips per episode"}))
    parser.add_argument("--supports", type=int, help="support draws per category")
    parser.add_argument("--support-frames", type=int, help="annotated frames per support clip")
    parser.add_argument("--episodes", type=int, help="episodes per seed, for the protocol random")
    parser.add_argument("--episode-seed", type=int, help="seed of the draws")


def _run(commands) -> None:
    run = _command(commands, "run", calls.run, "ask methods every query; start again to go on")
    words = "names, see `list`, joined by commas; package.module:Class; or all"
    run.add_argument("--method", "--methods", required=True, type=_names, help=words)
    _dataset_options(run)
    numbers = {"type": _numbers, "default": (None,)}
    _episode_options(run, {**numbers, "help": "support clips per episode; several numbers joined by commas"})
    run.add_argument("--manifest", type=Path, help="ask the episodes of this file")
    run.add_argument("--draws", type=int, help="ask only the first support draws")
    run.add_argument("--queries", type=int, help="ask that many queries per episode, evenly spaced over its list")
    run.add_argument("--adapt", type=_names, default=("none",), help="strategy, see `list`; joined by commas (none)")
    run.add_argument("--adapt-steps", **numbers, help="its gradient steps; several numbers joined by commas")
    run.add_argument("--adapt-lr", type=float, help="its learning rate")
    run.add_argument("--adapt-option", action="append", default=[], metavar="NAME=VALUE", help="such as augment=false")
    run.add_argument("--jobs", type=int, help="processes, for several runs (default: one per core; one on a GPU)")
    run.add_argument("--scoring", action="append", default=[], help="scoring protocol in place of the protocol's own")
    run.add_argument("--weights", help="checkpoint file, name of a shipped one, or untrained")
    run.add_argument("--config", default="tiny", help="tiny, paper or a JSON file (default %(default)s)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    run.add_argument("--window", type=int, default=10, help="frames that the network sees at once (%(default)s)")
    run.add_argument("--batch", type=int, help="windows of a clip that it computes together (default 1; on a GPU 4)")
    run.add_argument("--kernels", metavar="NAME", help="force reference, pytorch, numba or triton (default: fastest)")
    run.add_argument("--compile", action="store_true", help="torch.compile the network; its first windows are slow")
    run.add_argument("--seed", type=int, default=0, help="of the method's own randomness")
    run.add_argument("--text", default="right", help="right, empty or other: which sentence is asked")
    run.add_argument("--support", default="right", help="right, other-category or none: which support is shown")
    run.add_argument("--shard", type=_shard, metavar="I/N", help="the I-th of N parts of the episodes, I from 0")
    run.add_argument("--workers", type=int, default=1, help="processes that score; 0: between the queries")
    run.add_argument("--out", type=Path, help="base folder (default runs/<dataset>-<protocol>)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, nor several joined by commas, such as 1,5")
    return tuple(map(int, text.split(",")))


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/2")
    return int(first), int(count)


def _train(commands) -> None:
    train = _command(commands, "train", calls.train, "train a method on the base categories of a group")
    train.add_argument("--method", default="cma", help="a method with weights, see `list` (default %(default)s)")
    _dataset_options(train, group="1")
    train.add_argument("--config", default="tiny", help="tiny, paper or a JSON file (default %(default)s)")
    train.add_argument("--out", type=Path, help="folder (default runs/train/<method>-<dataset>-<group>)")
    train.add_argument("--init", help="checkpoint to start from, file or shipped name (upstream: one of ReferFormer)")
    train.add_argument("--steps", type=int, help="stop after that many, the schedule unchanged (--meta: its length)")
    train.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="as lr=1e-3; repeatable")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; torchrun uses all")
    train.add_argument("--no-resume", action="store_true", help="begin anew although the folder holds a training")
    train.add_argument("--meta", help="maml, anil or meta-sgd: learn weights to adapt from, in one process")
    train.add_argument("--inner-steps", type=int, help="gradient steps on the support (default: the configuration's)")
    train.add_argument("--inner-lr", type=float, help="their learning rate (default: the configuration's)")
    train.add_argument("--second-order", action="store_true", help="differentiate through them twice")


def _results(commands) -> None:
    score = _command(commands, "score", calls.score, "judge stored predictions under other scoring protocols")
    score.add_argument("folder", type=Path, nargs="+", help="run folders, or folders above them")
    score.add_argument("--scoring", action="append", required=True, help="scoring protocol; may be repeated")
    score.add_argument("--data-root", type=Path, help="folder of the dataset that the runs name")
    score.add_argument("--out", type=Path, required=True, help="new folder; the runs keep their names below it")
    score.add_argument("--workers", type=int, default=1)
    compare = _command(commands, "compare", calls.compare, "paired difference of two methods on the same queries")
    compare.add_argument("first", type=Path, help="run folder, or a folder above the runs of all groups")
    compare.add_argument("second", type=Path)
    compare.add_argument("--scoring", help="one scoring protocol, where the runs have several")
    table = _command(commands, "table", calls.table, "tables of all runs: Markdown, LaTeX, CSV, leaderboard.md")
    table.add_argument("folder", type=Path, nargs="+", help="run folders, or folders above them")
    table.add_argument("--scoring", help="one scoring protocol, where the runs have several")
    table.add_argument("--partial", action="store_true", help="also runs that are not finished, marked")
    table.add_argument("--curve", metavar="shots|steps", help="instead, a plot of J&F against these, and its numbers")
    table.add_argument("--out", type=Path, default=Path("."), help="where the files go (default: here)")
    picture = _command(commands, "picture", calls.picture, "one PNG: per group an episode with each method's answer")
    picture.add_argument("folder", type=Path, nargs="+", help="run folders, or folders above them")
    picture.add_argument("--data-root", type=Path, help="folder of the dataset that the runs name")
    picture.add_argument("--out", type=Path, default=Path("picture.png"))


def _episodes(commands) -> None:
    parser = commands.add_parser("episodes", help="build, show and check lists of episodes")
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    build = _command(actions, "build", calls.build, "draw the episodes of a dataset, from metadata alone")
    _dataset_options(build)
    _episode_options(build)
    build.add_argument("--out", type=Path, default=Path("manifests"), help="folder (default %(default)s)")
    show = _command(actions, "show", calls.show, "print one episode")
    show.add_argument("id", help="its id, or the beginning of it")
    show.add_argument("--manifest", type=Path, action="append", help="file to look in (default: the frozen ones)")
    check = _command(actions, "check", calls.check, "prove that a manifest leaks nothing")
    check.add_argument("manifest", type=Path, nargs="*", help="files (default: the frozen ones)")
    check.add_argument("--data-root", type=Path, help="hold it against the dataset in this folder, too")


def _data(commands) -> None:
    parser = commands.add_parser("data", help="write the built-in data, check a dataset folder")
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    synth = _command(actions, "synth", calls.synth, "write the small synthetic benchmark in all four layouts")
    synth.add_argument("folder", type=Path)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--videos", type=int, default=10, help="per category, youtube layout (default %(default)s)")
    synth.add_argument("--frames", type=int, default=8, help="per video (default %(default)s)")
    synth.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    synth.add_argument("--layout", action="append", help="youtube, sail, davis or mevis (default: all)")
    synth.add_argument("--workers", type=int, default=2)
    check = _command(actions, "check", calls.data_check, "read a whole dataset and list every fault")
    check.add_argument("folder", type=Path)
    check.add_argument("--dataset", default="mini-ref-youtube-vos", help="name, see `list` (default %(default)s)")
    check.add_argument("--fast", action="store_true", help="structure only, no pixels")
    check.add_argument("--checksums", choices=("write", "verify"), help="of all files, in the --checksum-file")
    check.add_argument("--checksum-file", type=Path, help="default <folder>/checksums.sha256")


def _methods(commands) -> None:
    _command(commands, "list", calls.list_names, "names of methods, datasets, protocols and shipped checkpoints")
    describe = _command(commands, "describe", calls.describe, "what a method is and needs")
    describe.add_argument("method")
    describe.add_argument("--check", action="store_true", help="hold it to the contract on two synthetic episodes")
    describe.add_argument("--weights", help="checkpoint for --check (default untrained)")
    describe.add_argument("--config", default="tiny")
    describe.add_argument("--device", default="auto")
    new = _command(commands, "new-method", calls.new_method, "write a working adapter with its test")
    new.add_argument("name")
    new.add_argument("--out", type=Path, default=Path("."), help="folder (default: here)")


def _speed(commands) -> None:
    speed = _command(commands, "speed", calls.speed, "speed ratios, both ways measured in one run", add_help=False)
    speed.add_argument("rest", nargs=argparse.REMAINDER)


if __name__ == "__main__":
    sys.exit(main())
