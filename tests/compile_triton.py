"""Compile the Triton kernels for GPUs that need not be there; prints one line of JSON per kernel.

Run without TRITON_INTERPRET: what the interpreter forgives, the compiler refuses. Takes compute capabilities as
arguments, such as 80 90. A line: kernel, type, capability, registers, spilled bytes (null where ptxas tells nothing).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewref.kernels import deformable_triton

LEVELS, POINTS, CHANNELS = 4, 4, 32
FLOATS = ("locations", "weights", "grad_value", "grad_locations", "grad_weights")
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


def source(kernel, dtype: str, scatter: bool, odd: bool) -> ASTSource:
    """The kernel at the paper's sizes: pointers and strides that 16 divides, channels next to each other; odd: nothing
    is known of strides, the number of channels and the pointers."""
    constants = {
        "LEVELS": LEVELS,
        "POINTS": POINTS,
        "BLOCK_Q": deformable_triton.BLOCK_Q,
        "BLOCK_D": CHANNELS,
        "SCATTER": scatter,
        "stride_d": 1,
    }
    if "BLOCK_S" in kernel.arg_names:
        constants |= {"BLOCK_S": deformable_triton.GATHER_PIXELS, "BLOCK_Q": deformable_triton.GATHER_QUERIES}
    left_out = {"stride_d"} if odd else set()
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names and name not in left_out}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in ("value", "output", "grad"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*i32" if name == "levels" else "i32"
        divisible = name.startswith("stride_") or name == "channels" or signature[name].startswith("*")
        if divisible and name not in constants and not odd:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def main() -> None:
    """Compile every kernel for every type and capability."""
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    kernels = {
        "forward": deformable_triton._forward_kernel,
        "backward": deformable_triton._backward_kernel,
        "backward, no atomics": deformable_triton._backward_kernel,
        "gather": deformable_triton._gather_kernel,
        "forward, odd": deformable_triton._forward_kernel,
        "backward, odd": deformable_triton._backward_kernel,
    }
    for capability, dtype, (name, kernel) in product(map(int, sys.argv[1:]), TYPES, kernels.items()):
        if name not in ("forward", "backward") and (dtype, capability) != ("fp32", 90):
            continue  # the other four once: other cards and types tell no more of them
        scatter, odd = name.startswith("backward") and "no atomics" not in name, "odd" in name
        warps = deformable_triton._tiling(1, CHANNELS, TYPES[dtype] if name.startswith("forward") else 4)[2]
        target, log = GPUTarget("cuda", capability, 32), io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source(kernel, dtype, scatter, odd), target=target, options={"num_warps": warps})
        used = re.search(r"Used (\d+) registers", log.getvalue())
        spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
        line = {
            "kernel": name,
            "type": dtype,
            "capability": capability,
            "bytes": len(compiled.asm["cubin"]),
            "registers": used and int(used[1]),
            "spilled": spilled and int(spilled[1]),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
