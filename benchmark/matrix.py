"""`run` with lists: each method with each strategy, group, number of shots and of steps, as one job to resume."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewref.benchmark.commands import RunOptions, check_settings, chosen_episodes, run_groups
from fewref.benchmark.inputs import named_values, open_dataset
from fewref.benchmark.protocol import get_protocol
from fewref.benchmark.runner import RunResult
from fewref.episodes.errors import InputError, near
from fewref.methods.adaptation.meta import rates_path
from fewref.methods.adaptation.options import META, STRATEGIES, adapt_options
from fewref.methods.base import UNTRAINED, Method, Trainable
from fewref.methods.registry import METHODS, load_method
from fewref.methods.shipped import find_weights

ALL = "all"
STEPLESS = ("none", "prototype")  # strategies that take no gradient steps


@dataclass(frozen=True)
class Lists:
    """What `run` is asked to combine. methods: names, or "all" alone for every one that is shipped, controls too.

    shots, steps: None is the default, of the protocol and of the strategy.
    """

    methods: tuple[str, ...]
    strategies: tuple[str, ...] = ("none",)
    shots: tuple[int | None, ...] = (None,)
    steps: tuple[int | None, ...] = (None,)


def supported(cls: type[Method]) -> tuple[str, ...]:
    """The strategies that work around a method: all where it computes a training loss, else "none"."""
    return STRATEGIES if issubclass(cls, Trainable) else STRATEGIES[:1]


def run_matrix(lists: Lists, base: RunOptions, jobs: int | None = None) -> list[RunResult]:
    """Run every combination, a run folder each; the same call again goes on where it was stopped.

    base: all other options. jobs: processes; None takes one per core, or one in all on a GPU or under torchrun. A
    single method, strategy, number of shots and of steps is run in this process, one group after the other.
    With methods "all", what is impossible is left out, with a line on stderr. Raises InputError before anything starts
    for unknown names, for what is impossible although it was asked for by name, and for bad options and data.
    """
    check_lists(lists, base)
    jobs = count_jobs(jobs, base.device)
    if ALL not in lists.methods and max(map(len, vars(lists).values())) == 1:
        ((method, strategy),) = combinations(lists)
        check_possible(method, strategy, base)
        return run_groups(adapted(with_shots(base, lists.shots[0]), method, strategy, lists.steps[0]))
    plans, left_out = plan(lists, base)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return run_all(plans, jobs, "matrix")


def count_jobs(jobs: int | None, device: str) -> int:
    """How many processes to use. Raises InputError for fewer than one."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: at least one process is needed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 1  # torchrun's processes share every run among them
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or (cores if on_cpu else 1)


def plan(lists: Lists, base: RunOptions) -> tuple[list[RunOptions], list[str]]:
    """Every run of the matrix, a group each, and a line for each combination that is left out.

    Raises InputError as `run_matrix`.
    """
    check_settings(base)
    index = open_dataset(base.dataset, base.data_root)
    default = get_protocol(base.protocol).episodes.shots
    plans, left_out = [], {}
    for shots in lists.shots:
        of_shots = with_shots(base, shots)
        if base.out and len(lists.shots) > 1 and shots not in (None, default):
            of_shots = replace(of_shots, out=base.out / f"shots{shots}")
        groups = tuple(chosen_episodes(of_shots, index))
        for method, strategy in combinations(lists):
            steps = (None,) if strategy in STEPLESS else lists.steps
            try:
                check_possible(method, strategy, base, groups)
            except InputError as error:
                if ALL not in lists.methods:
                    raise
                left_out[method, strategy] = str(error)
                continue
            options = [adapted(of_shots, method, strategy, count, len(lists.steps) > 1) for count in steps]
            plans += [replace(one, group=group) for one in options for group in groups]
    done = {one.adapt for one in plans}
    for (_, strategy), reason in left_out.items():
        if strategy not in done:
            raise InputError(reason)
    return plans, [f"{called(*names)}: {reason}" for names, reason in left_out.items()]


def with_shots(base: RunOptions, shots: int | None) -> RunOptions:
    """The options with a number of shots; None leaves the protocol's."""
    return base if shots is None else replace(base, changes={**base.changes, "shots": shots})


def called(method: str, strategy: str) -> str:
    """A method with a strategy as tables name it."""
    return method if strategy == "none" else f"{method} + {strategy}"


def combinations(lists: Lists) -> Iterable[tuple[str, str]]:
    """(method, strategy), methods first; a control comes once, with "none", whatever the strategies are."""
    names = tuple(METHODS) if ALL in lists.methods else lists.methods
    for name in names:
        control = load_method(name).info.kind == "control"
        once = control and (len(names) > 1 or "none" in lists.strategies)
        yield from ((name, strategy) for strategy in (("none",) if once else lists.strategies))


def adapted(base: RunOptions, method: str, strategy: str, steps: int | None, tell: bool = False) -> RunOptions:
    """The options of one combination; changes that a strategy has no use for are left away."""
    changes = {} if strategy == "none" else dict(base.adapt_changes)
    if strategy in STEPLESS:
        changes.pop("lr", None)
    if steps is not None:
        changes["steps"] = steps
    tag = f"-steps{steps}" if steps is not None and tell else ""
    return replace(base, method=method, adapt=strategy, adapt_changes=changes, tag=tag)


def check_lists(lists: Lists, base: RunOptions) -> None:
    """Raises InputError for unknown and repeated names, and for options that nothing asked for would use."""
    if ALL in lists.methods and len(lists.methods) > 1:
        raise InputError("--methods: 'all' stands alone, or name methods")
    for strategy in lists.strategies:
        if strategy not in STRATEGIES:
            raise InputError(f"--adapt {strategy!r} is unknown: {near(strategy, STRATEGIES)}")
    for name in lists.methods if ALL not in lists.methods else ():
        load_method(name)
    for option, values in zip(("--methods", "--adapt", "--shots", "--adapt-steps"), vars(lists).values(), strict=True):
        if len(set(values)) < len(values):
            raise InputError(f"{option}: {', '.join(map(str, values))} names something twice; name each once")
    if base.weights not in (None, UNTRAINED) and (ALL in lists.methods or len(lists.methods) > 1):
        raise InputError(f"--weights {base.weights}: a checkpoint is of one method; give one --method with it")
    stepless = set(lists.strategies) <= set(STEPLESS)
    if stepless and (lists.steps != (None,) or "lr" in base.adapt_changes):
        option = "--adapt-steps" if lists.steps != (None,) else "--adapt-lr"
        raise InputError(f"{option}: --adapt {','.join(lists.strategies)} takes no steps; name another, as finetune")
    if base.adapt_changes and lists.strategies == ("none",):
        raise InputError(f"--adapt-option {min(base.adapt_changes)}: nothing is adapted; give --adapt, as finetune")
    if lists.steps != (None,) and "steps" in base.adapt_changes:
        raise InputError("--adapt-option steps: is given by --adapt-steps, too; leave one away")


def check_possible(method: str, strategy: str, base: RunOptions, groups: Sequence[str] = ()) -> None:
    """Raises InputError where a method does not support a strategy, has no support, or no checkpoint for a group."""
    cls = load_method(method)
    if strategy not in supported(cls):
        raise InputError(f"--adapt {strategy}: method {method} has no training loss; it supports none alone")
    if strategy != "none" and base.support == "none":
        raise InputError(f"--adapt {strategy}: --support none leaves nothing to adapt to; leave one of them away")
    if strategy != "none" and base.compile:
        raise InputError(f"--compile: --adapt {strategy} uses the network in ways that compile anew; leave one away")
    if strategy in META and importlib.util.find_spec("learn2learn") is None:
        raise InputError(f"--adapt {strategy}: learn2learn is not installed; `make setup-meta` installs it")
    for group in groups if cls.info.needs_weights else ():
        weights = find_weights(method, base.weights, base.config, base.dataset, group, strategy)
        if strategy == "meta-sgd" and not rates_path(Path(weights)).is_file():
            raise InputError(f"--adapt meta-sgd: {weights} has no learning rates; `train --meta meta-sgd` writes them")


def run_all(plans: Sequence[RunOptions], jobs: int, title: str) -> list[RunResult]:
    """Run everything planned in `jobs` processes, adapted runs first, as they are the longest.

    Results are in the order of `plans`. One job runs here. Raises the first InputError, and InputError where a process
    was killed; what is finished by then stays.
    """
    bar = {"total": len(plans), "unit": "run", "desc": title}
    if min(jobs, len(plans)) == 1:
        return [result for one in tqdm(plans, **bar) for result in run_groups(replace(one, progress=False))]
    order = sorted(range(len(plans)), key=lambda number: plans[number].adapt == "none")
    spawn = multiprocessing.get_context("spawn")
    results: dict[int, list[RunResult]] = {}
    with ProcessPoolExecutor(min(jobs, len(plans)), spawn, _begin_process) as pool:
        started = {pool.submit(run_groups, replace(plans[n], progress=False, workers=0)): n for n in order}
        try:
            for job in tqdm(as_completed(started), **bar):
                results[started[job]] = job.result()
        except BrokenProcessPool:
            raise InputError("a process of the runs was killed, perhaps for memory; go on with --jobs 1") from None
        except BaseException as error:
            pool.shutdown(wait=isinstance(error, KeyboardInterrupt), cancel_futures=True)  # Ctrl-C ends the others, too
            raise
    return [result for number in sorted(results) for result in results[number]]


def _begin_process() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # rows are written whole; a stopped process has nothing to say


def adapt_changes(lr: float | None, options: Sequence[str]) -> dict[str, Any]:
    """Fields of `AdaptOptions` from --adapt-lr and every --adapt-option, "NAME=VALUE" with VALUE in JSON.

    Raises InputError, with near names, for what is no such field, and for a value that is not JSON.
    """
    changes = named_values("--adapt-option", options)
    if lr is not None:
        if "lr" in changes:
            raise InputError("--adapt-option lr: is given by --adapt-lr, too; leave one away")
        changes["lr"] = lr
    adapt_options("finetune", {}, changes)
    return changes
