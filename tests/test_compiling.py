"""Compiled parts answer as the others do, keep their names, and say what is missing where nothing can be compiled."""

from __future__ import annotations

import copy
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn

from fewref.episodes.errors import InputError
from fewref.methods.base import UNTRAINED, Trainable
from fewref.methods.check import make_case
from fewref.methods.compiling import check_compiler, compile_parts, paying_parts
from fewref.methods.parts import backbone_body, clip_parts
from fewref.methods.registry import load_method


def compiled(network: nn.Module) -> list[str]:
    """Names of the methods that were exchanged."""
    return [
        f"{path}.{name}"
        for path, part in network.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, MethodType)
    ]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def answers(method: Trainable, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Probabilities for a clip of each length."""
    found = []
    for number, frames in enumerate(lengths):
        case = make_case(number, "dog", (32, 48), frames)
        method.adapt(case.support)
        found.append(method.probabilities(case.query)[0].numpy())
    return found


CASES = [("cma", "fp32", "all"), ("referformer", "bf16", "paying"), ("tf2", "fp32", "paying")]


@pytest.mark.parametrize(("name", "precision", "parts"), CASES)
def test_the_answers_stay(name: str, precision: str, parts: str) -> None:
    """On a CPU the backbone alone pays; the parts that pay on a GPU are compiled here once too."""
    method = load_method(name)(weights=UNTRAINED, precision=precision)
    network, lengths = method.network, (2,) if parts == "all" else (3, 2)
    plain = answers(method, lengths)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert paying_parts(network) == [(backbone_body(network), "forward")]
    kinds = {getattr(type(part), called): (part, called) for part, called in clip_parts(network)}
    compile_parts(network, "aot_eager", list(kinds.values()) if parts == "all" else None)
    if parts == "all":  # one of each kind
        block = "pixel_decoder.cross_attn_4"
        wanted = [f"{block}.look_around", f"{block}.read", "pixel_decoder.layer_4.forward"]
        assert sorted(compiled(network)) == [*wanted, "transformer.encoder.layers.1.forward"]
    else:
        assert compiled(network) == ["backbone.0.body.forward"]
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = answers(method, lengths)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > seen, "nothing was compiled"
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(other, one, atol=tolerance)
    after = method.network.state_dict()
    assert list(after) == list(state)
    assert [key for key, value in after.items() if not torch.equal(value, state[key])] == []
    for twin, module in zip(copy.deepcopy(method.network).modules(), method.network.modules(), strict=True):
        held = [value.__self__ for value in vars(twin).values() if isinstance(value, MethodType)]
        assert all(owner is twin and owner is not module for owner in held), "a copy would use the original's weights"


def test_gradients_stay() -> None:
    """Adaptation trains a compiled network too."""
    method = load_method("referformer")(weights=UNTRAINED)
    shot = make_case(0, "dog", (32, 48), 2).support.shots[0]
    gradients = []
    for _ in range(2):
        method.network.zero_grad()
        method.loss(shot, [shot]).backward()
        gradients.append({name: p.grad.clone() for name, p in method.network.named_parameters() if p.grad is not None})
        compile_parts(method.network, backend="aot_eager")
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_real_compiler() -> None:
    """The default back end, on the smallest part; only where the machine can compile."""
    device = torch.device("cpu")
    try:
        check_compiler(device)
    except InputError as error:
        pytest.skip(str(error))
    method = load_method("referformer")(weights=UNTRAINED)
    body, frames = backbone_body(method.network).eval(), torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        plain = body(frames)
        body.compile()
        for one, other in zip(plain, body(frames), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """One line that says what to install; nothing is left half compiled."""
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-such-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    cpp_builder.cpp_compiler_search.cache_clear()
    method = load_method("referformer")(weights=UNTRAINED)
    try:
        with pytest.raises(InputError, match=r"^--compile: cannot compile for cpu \(.*\); install a C\+\+ compiler.*$"):
            compile_parts(method.network)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert not compiled(method.network)
