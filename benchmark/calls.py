"""One function per command: from its parsed options to a call; returns the exit code.

Everything is imported late: a command loads what it needs, and a word that is wrong is told at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fewref.episodes.errors import InputError

CHANGES = ("shots", "supports", "support_frames", "episodes", "episode_seed")  # fields of EpisodeProtocol


def demo(o: argparse.Namespace) -> int:
    from fewref.benchmark.demo import demo

    out = o.out or Path("runs/leaderboard" if o.leaderboard else "runs/demo")
    return demo(out, o.draws, o.leaderboard, o.retrain, o.queries)


def run(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import RunOptions, report
    from fewref.benchmark.matrix import Lists, adapt_changes, run_matrix

    lists = Lists(o.method, o.adapt, o.shots, o.adapt_steps)
    names = "dataset data_root group weights config protocol manifest draws queries device precision window batch"
    names += " seed text support shard workers out kernels compile"
    values = {name: getattr(o, name) for name in names.split()}
    values |= {"changes": _changes(o), "adapt_changes": adapt_changes(o.adapt_lr, o.adapt_option)}
    return report(run_matrix(lists, RunOptions(method=o.method[0], **values, scoring=tuple(o.scoring)), o.jobs))


def train(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import train_group
    from fewref.benchmark.inputs import named_values
    from fewref.methods.shipped import named_file

    names = "method dataset data_root group config seed steps device"
    values = {name: getattr(o, name) for name in names.split()}
    values |= {"resume": not o.no_resume, "changes": named_values("--option", o.option)}
    values["init"] = named_file(o.init, "--init") if o.init else None
    values["out"] = o.out or Path("runs/train") / f"{'+'.join(filter(None, (o.method, o.meta)))}-{o.dataset}-{o.group}"
    if o.meta:
        from fewref.benchmark.meta_train import meta_train as train_group

        values |= {"meta": o.meta, "inner_steps": o.inner_steps, "inner_lr": o.inner_lr}
        values["first_order"] = not o.second_order
    elif o.inner_steps is not None or o.inner_lr is not None or o.second_order:
        raise InputError("--inner-steps, --inner-lr and --second-order are of --meta; name one, such as --meta maml")
    print(train_group(**values))
    return 0


def score(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import rescore

    return rescore(o.folder, o.data_root, o.scoring, o.out, o.workers)


def compare(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import find_runs
    from fewref.benchmark.table import comparison

    print(comparison(find_runs([o.first]), find_runs([o.second]), o.scoring))
    return 0


def table(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import find_runs

    if o.curve:
        from fewref.benchmark.curve import write_curve

        paths = write_curve(find_runs(o.folder), o.curve, o.out, o.scoring, o.partial)
    else:
        from fewref.benchmark.table import write_tables

        paths = write_tables(find_runs(o.folder), o.out, o.scoring, o.partial)
    print("\n".join(map(str, paths)))
    return 0


def picture(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import draw_picture

    print(draw_picture(o.folder, o.data_root, o.out))
    return 0


def build(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import build_manifests

    names = ["dataset", "data_root", "group", "protocol", "out"]
    for path in build_manifests(**{name: getattr(o, name) for name in names}, changes=_changes(o)):
        print(path)
    return 0


def show(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import load_manifests
    from fewref.episodes.show import episode_text, find_episode

    print(episode_text(find_episode(load_manifests(o.manifest), o.id)))
    return 0


def check(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import check_manifests

    return check_manifests(o.manifest, o.data_root)


def synth(o: argparse.Namespace) -> int:
    from fewref.episodes.synthetic import FOLDERS, write_synthetic

    layouts = tuple(o.layout or FOLDERS)
    write_synthetic(o.folder, o.seed, o.videos, layouts, tuple(o.size), o.frames, o.workers)
    for layout in layouts:
        print(o.folder / FOLDERS[layout])
    return 0


def data_check(o: argparse.Namespace) -> int:
    from fewref.benchmark.commands import check_data

    return check_data(o.dataset, o.folder, o.fast, o.checksums, o.checksum_file)


def list_names(o: argparse.Namespace) -> int:
    from fewref.benchmark.listing import everything

    print(everything())
    return 0


def describe(o: argparse.Namespace) -> int:
    from fewref.benchmark.listing import describe

    return describe(o.method, o.check, o.weights, o.config, o.device)


def new_method(o: argparse.Namespace) -> int:
    from fewref.methods.scaffold import new_method

    for path in new_method(o.name, o.out):
        print(path)
    return 0


def speed(o: argparse.Namespace) -> int:
    from fewref.benchmark.speed import main as speed

    return speed(o.rest)


def _changes(options: argparse.Namespace) -> dict[str, int]:
    given = {name: getattr(options, name) for name in CHANGES}
    given = {name: value for name, value in given.items() if isinstance(value, int)}  # several shots make a matrix
    return {name.removeprefix("episode_"): value for name, value in given.items()}
