"""What there is: methods, datasets, protocols, checkpoints; and what one method needs."""

from __future__ import annotations

import torch
from tabulate import tabulate

from fewref.benchmark.inputs import choose_device
from fewref.benchmark.matrix import supported
from fewref.benchmark.protocol import PROTOCOLS
from fewref.benchmark.scoring import SCORING
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import META, STRATEGIES
from fewref.methods.base import UNTRAINED
from fewref.methods.check import check_method
from fewref.methods.registry import load_method, method_names
from fewref.methods.shipped import CHECKPOINTS, find_weights, shipped_names
from fewref.methods.weights import sha256
from fewref.splits import DATASETS, load_split

SUMMARIES = {
    "none": "the method as it is (zero-shot, or with its own support branch)",
    "finetune": "gradient steps on the support, in each episode anew",
    "head": "the same, on the last layers alone",
    "prototype": "nearest prototype of its visual features, pooled under the support's masks; no text",
    "maml": "plain gradient steps from meta-learned weights (learn2learn)",
    "anil": "the same, on the last layers alone",
    "meta-sgd": "the same, with a meta-learned rate for each weight",
    "self-train": "labels of its own on the frames of the query (transductive)",
}


def everything() -> str:
    """Tables of all names that options take."""
    infos = [load_method(name).info for name in method_names()]
    splits = [load_split(name) for name in DATASETS]
    parts = {
        "methods": ([(info.name, info.kind, info.summary) for info in infos], ("name", "kind", "what it is")),
        "datasets": (
            [(s.dataset, s.layout, len(s.categories) or "as found", ", ".join(s.groups)) for s in splits],
            ("name", "layout", "categories", "groups"),
        ),
        "protocols": (
            [(p.name, p.episodes.name, p.scoring, p.summary) for p in PROTOCOLS.values()],
            ("name", "episodes", "scoring", "what it asks"),
        ),
        "scoring protocols": ([(name,) for name in SCORING], ("name",)),
        "adaptation strategies": ([(name, SUMMARIES[name]) for name in STRATEGIES], ("name", "what it does")),
        "shipped checkpoints": ([(name,) for name in shipped_names()], ("name",)),
    }
    return "\n\n".join(f"{title}\n{tabulate(rows, headers)}" for title, (rows, headers) in parts.items())


def describe(name: str, check: bool, weights: str | None, config: str, device: str) -> int:
    """Print what a method declares of itself; with `check` also the contract, rule by rule. Returns 1 for a FAIL."""
    cls = load_method(name)
    info = cls.info
    lines = [(field, getattr(info, field)) for field in ("name", "kind", "summary", "paper", "source", "licence")]
    lines += [
        (
            "uses",
            " and ".join(part for part, used in (("text", info.uses_text), ("support", info.uses_support)) if used),
        )
    ]
    lines += [("sees the truth", "yes, a bound and no competitor")] if info.sees_truth else []
    lines += [("weights", "needed" if info.needs_weights else "none")]
    lines += [("adaptation", ", ".join(supported(cls)))]
    for shipped in shipped_names():
        if shipped.startswith((f"{info.name}-builtin", *(f"{info.name}+{strategy}-" for strategy in META))):
            lines.append((f"shipped {shipped}", f"sha256 {sha256(CHECKPOINTS / shipped / 'weights.safetensors')}"))
    print(tabulate([line for line in lines if line[1]], tablefmt="plain"))
    if not check:
        return 0
    chosen = None
    if info.needs_weights:
        chosen = find_weights(name, weights or UNTRAINED, config, "", "")
    elif weights:
        raise InputError(f"--weights {weights}: method {name} has no weights")
    checks = check_method(cls, weights=chosen, config=config, device=choose_device(device))
    rows = [("pass" if item.passed else "FAIL", item.name, item.detail) for item in checks]
    print(f"\nweights: {chosen or 'none'}, torch {torch.__version__}\n{tabulate(rows, ('', 'rule', 'detail'))}")
    return 0 if all(item.passed for item in checks) else 1
