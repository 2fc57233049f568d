"""The operators against golden numbers in float64 of the authors' reference code: every case, values and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_by_name
from golden_case import Expect, golden_folder, load_cases
from torch import Tensor, nn

from fewref.kernels import deformable_attention
from fewref.kernels.affinity import affinity
from fewref.kernels.deformable_attention import ms_deform_attn
from fewref.kernels.dispatch import BACKENDS, import_problem, using
from fewref.kernels.dynamic_mask import aligned_bilinear, dynamic_mask_head, parameter_counts
from fewref.methods.cma.affinity import QKV, SupportFeatures, SupportShot, prepare_support, rewrite_level
from fewref.methods.layers.deformable import MSDeformAttn, grid_references, valid_ratio

GOLDEN = golden_folder("kernels")
Inputs = dict[str, Tensor]


def read_inputs(case: dict, arrays: Mapping[str, np.ndarray], device: str) -> Inputs:
    """The case's input arrays on a device; floating ones collect gradients."""
    names = [name for name, told in case["arrays"].items() if told["role"] == "input"]
    tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in names}
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}


def map_shapes(given: Inputs) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in given["spatial_shapes"].tolist()]


def check_core(case: dict, given: Inputs, expect: Expect) -> None:
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (given[name] for name in names)
    output = ms_deform_attn(value, map_shapes(given), locations, weights)
    output.backward(given["grad_output"])
    expect("output", output)
    expect("grad_value", value.grad)
    expect("grad_attention_weights", weights.grad)
    strict = "grad_sampling_locations_strict"
    if strict in expect.arrays:  # on the border two derivatives are right; each entry must be one of them
        plain, got = "grad_sampling_locations", locations.grad.cpu().numpy()
        closer = np.abs(got - expect.arrays[strict]) < np.abs(got - expect.arrays[plain])
        expect.arrays[plain] = np.where(closer, expect.arrays[strict], expect.arrays[plain])
        expect.left.discard(strict)
    expect("grad_sampling_locations", locations.grad)


def check_module(case: dict, given: Inputs, expect: Expect) -> None:
    config = case["config"]
    module = MSDeformAttn(config["d_model"], config["n_levels"], config["n_heads"], config["n_points"])
    fill_by_name(module)
    module.to(given["query"].device)
    query, references, source = (given[name] for name in ("query", "reference_points", "input_flatten"))
    shapes = map_shapes(given)
    locations, weights = module.samples(query, references, shapes)
    output = module(query, references, source, shapes, given.get("input_padding_mask"))
    output.backward(given["grad_output"])
    expect("output", output)
    expect("sampling_locations", locations)
    expect("attention_weights", weights)
    for name, tensor in (("query", query), ("reference_points", references), ("input_flatten", source)):
        expect(f"grad_{name}", tensor.grad)
    norms = config.get("param_grad_norms")
    for name, parameter in module.named_parameters():
        if norms is None:
            expect(f"grad_param.{name}", parameter.grad)
        else:
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-4)


def check_init(case: dict, given: Inputs, expect: Expect) -> None:
    for name in sorted(expect.left):
        heads, levels, points = (int(part[1:]) for part in name.split("_")[-3:])
        module = MSDeformAttn(heads * 4, levels, heads, points)
        expect(name, module.sampling_offsets.bias)
        assert not module.sampling_offsets.weight.any()
        assert not module.attention_weights.weight.any()


def check_references(case: dict, given: Inputs, expect: Expect) -> None:
    masks = [given[f"mask_{level}"] for level in range(len(case["config"]["spatial_shapes"]))]
    ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)
    expect("valid_ratios", ratios)
    expect("reference_points", grid_references([tuple(mask.shape[1:]) for mask in masks], ratios))


def check_affinity(case: dict, given: Inputs, expect: Expect) -> None:
    query, keys, values = given["Q"].transpose(1, 2), given["K"], given["V"].transpose(1, 2)
    output = affinity(query, keys, values).transpose(1, 2)
    output.backward(given["grad_M"])
    expect("M", output)
    identity = torch.eye(keys.shape[1]).expand(len(keys), -1, -1)
    expect("P", affinity(query, keys, identity).transpose(1, 2))
    for name in "QKV":
        expect(f"grad_{name}", given[name].grad)


def check_affinity_block(case: dict, given: Inputs, expect: Expect) -> None:
    width = case["config"]["dim"]
    parts = nn.ModuleDict(
        {
            "support_qkv": QKV(width, width // 2),
            "query_qkv": QKV(width, width // 2),
            "conv_q": nn.Conv2d(width, width // 2, 1),
            "layer_norm": nn.LayerNorm(width // 2),
        }
    )
    fill_by_name(parts)
    query, support, masks = given["query_feat"], given["support_feat"], given["support_masks"].detach()
    middle = slice(len(support) // 2, len(support) // 2 + 1)
    shot = SupportShot([support[None, middle]], [masks[middle]])
    prepared = prepare_support(SupportFeatures([shot]), [tuple(query.shape[-2:])], "cma", parts["support_qkv"])
    modules = (parts["query_qkv"], parts["conv_q"], parts["layer_norm"], nn.Identity())
    output = rewrite_level(query[None], prepared.levels[0], "cma", *modules)[0]
    output.backward(given["grad_output"])
    expect("output", output)
    for name, tensor in (("query_feat", query), ("support_feat", support)):
        expect(f"grad_{name}", tensor.grad[:, :: width // expect.arrays[f"grad_{name}"].shape[1]])
    for name, norm in case["config"]["param_grad_norms"].items():
        gradient = parts.get_parameter(name).grad
        if norm is None:
            assert gradient is None, f"{name} should have no part in the result"
        else:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-2), name


def check_head(case: dict, given: Inputs, expect: Expect) -> None:
    config = case["config"]
    features, parameters, references = (given[name] for name in ("mask_features", "params", "reference_points"))
    b, t = features.shape[:2]
    shape = (config["mask_dim"], config["dynamic_mask_channels"], config["controller_layers"], config["rel_coord"])
    assert parameter_counts(*shape) == (config["weight_nums"], config["bias_nums"])
    pixels = references * given["sizes"].flip(-1)[:, None]
    by_frame = [item.unflatten(1, (t, -1)).flatten(0, 1) for item in (parameters, pixels)]
    logits = dynamic_mask_head(
        features.flatten(0, 1),
        by_frame[0],
        by_frame[1] if config["rel_coord"] else None,
        stride=config["mask_feat_stride"],
        width=config["dynamic_mask_channels"],
        layers=config["controller_layers"],
    )
    logits = aligned_bilinear(logits, config["mask_feat_stride"] // config["mask_out_stride"])
    logits = logits.unflatten(0, (b, t)).flatten(1, 2)
    logits.backward(given["grad_output"])
    expect("mask_logits", logits)
    expect("grad_mask_features", features.grad)
    expect("grad_params", parameters.grad)
    expect("grad_reference_points", torch.zeros_like(references) if references.grad is None else references.grad)


CHECKS = {
    "ms_deform_attn_core": check_core,
    "ms_deform_attn_module": check_module,
    "ms_deform_attn_init": check_init,
    "encoder_reference_points": check_references,
    "affinity_attention": check_affinity,
    "cma_affinity_block": check_affinity_block,
    "dynamic_mask_head": check_head,
}
# The backends that differ for each kind; the rest of the kinds holds no operator.
SAMPLED, TWO = BACKENDS, ("reference", "pytorch")
FORMS = {"ms_deform_attn_core": SAMPLED, "ms_deform_attn_module": SAMPLED}
FORMS |= {"affinity_attention": TWO, "affinity_block": TWO, "dynamic_mask_head": TWO}
CASES = [
    pytest.param(case, backend, id=f"{Path(case['file']).stem}-{backend}")
    for case in load_cases(GOLDEN)
    for backend in FORMS.get(case["kind"], ("pytorch",))
]


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_case(case: dict, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "pytorch" samples by embedding bags at every size: by grid_sample, its form for some, it is the reference."""
    if problem := import_problem(backend):
        pytest.skip(problem)
    assert case["kind"] in CHECKS, f"{case['file']} has no check"
    with np.load(GOLDEN / case["file"]) as file:
        arrays = dict(file)
    monkeypatch.setattr(deformable_attention, "suits_bags", lambda *_: True)
    expect = Expect(case, arrays)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with using(backend):
        CHECKS[case["kind"]](case, read_inputs(case, arrays, device), expect)
    expect.finish()
