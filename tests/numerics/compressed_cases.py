"""Tensors in every format of compressed-tensors, and what a version of it makes of them.

Run as a script under another version, it writes the codes that this one gives, for the test:

    python tests/numerics/compressed_cases.py tests/numerics/compressed_tensors_0_17.safetensors
"""

from __future__ import annotations

import sys
from typing import Any

import torch

E4M3, UINT8 = torch.float8_e4m3fn, torch.uint8
CHANNEL, TENSOR, TOKEN = ({"strategy": name} for name in ("channel", "tensor", "token"))
MX = {"strategy": "group", "group_size": 32, "scale_dtype": UINT8, "zp_dtype": UINT8}
NVFP4 = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3, "zp_dtype": E4M3}
BLOCKS: dict[str, dict[str, Any]] = {
    "mx": {"block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "nvfp4": {"block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
}


def group(size: int) -> dict[str, Any]:
    """Return the arguments of groups of a size, as compressed-tensors has them."""
    return {"strategy": "group", "group_size": size}


def static(size: int) -> dict[str, Any]:
    """Return the same as a cfg has it."""
    return {"block_sizes": {-1: size, "type": "static"}}


INT8, INT4, FP8, FP4 = (
    {"num_bits": bits, "type": kind}
    for bits, kind in ((8, "int"), (4, "int"), (8, "float"), (4, "float"))
)
# By name: our cfg, their arguments.
WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8 channel": ({"num_bits": 8, "axis": 0}, {**INT8, **CHANNEL}),
    "int8 group128": ({"num_bits": 8, **static(128)}, {**INT8, **group(128)}),
    "int4 channel": ({"num_bits": 4, "axis": 0}, {**INT4, **CHANNEL}),
    "int4 group32": ({"num_bits": 4, **static(32)}, {**INT4, **group(32)}),
    "int4 group64": ({"num_bits": 4, **static(64)}, {**INT4, **group(64)}),
    "int4 group128": ({"num_bits": 4, **static(128)}, {**INT4, **group(128)}),
    "int4 group32 asymmetric": (
        {"num_bits": 4, **static(32), "symmetric": False},
        {**INT4, **group(32), "symmetric": False},
    ),
    "int4 group128 asymmetric": (
        {"num_bits": 4, **static(128), "symmetric": False},
        {**INT4, **group(128), "symmetric": False},
    ),
    "int8 group64 asymmetric": (
        {"num_bits": 8, **static(64), "symmetric": False},
        {**INT8, **group(64), "symmetric": False},
    ),
    "fp8 tensor": ({"num_bits": (4, 3), "axis": None}, {**FP8, **TENSOR}),
    "fp8 channel": ({"num_bits": (4, 3), "axis": 0}, {**FP8, **CHANNEL}),
    "fp8 blocks": (
        {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128, "type": "static"}},
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
    ),
    "mxfp8": ({"num_bits": (4, 3), **BLOCKS["mx"]}, {**FP8, **MX}),
    "mxfp4": ({"num_bits": (2, 1), **BLOCKS["mx"]}, {**FP4, **MX}),
    "nvfp4": ({"num_bits": (2, 1), **BLOCKS["nvfp4"]}, {**FP4, **NVFP4}),
}
# What 0.17 has no arithmetic for: MX scales of 8 bits.
ABSENT_IN_0_17 = {"mxfp8"}


def tensor(name: str) -> torch.Tensor:
    """Return a weight with outliers, a row of zeros, and ties at the steps of a coarse grid."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = torch.randn(192, 256, generator=generator) * 0.02
    weight[::7, ::11] *= 20
    weight[3] = 0
    weight[5, :128] = torch.arange(-64, 64) / 64
    weight[6] = weight[6].abs()
    return weight


def by_theirs(x: torch.Tensor, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the scales and codes that compressed-tensors gives a weight in float32."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    given = QuantizationArgs(dynamic=False, **{"symmetric": True, **args})
    low, high = extremes(x, args)
    over = None
    if args["strategy"] == "tensor_group":
        over = generate_gparam(x.amin(), x.amax())
    scale, zero = calculate_qparams(low, high, given, global_scale=over)
    made = quantize(x.clone(), scale, zero, given, global_scale=over)
    found = {"scale": scale.float(), "codes": made.float(), "zero_point": zero.float()}
    return found if over is None else {**found, "over": over}


def extremes(x: torch.Tensor, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest of the values that share a scale."""
    match args["strategy"]:
        case "tensor":
            return x.amin(), x.amax()
        case "channel" | "token":
            return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        case "block":
            rows, columns = args["block_structure"]
            lows = torch.empty(-(-x.shape[0] // rows), -(-x.shape[1] // columns))
            highs = lows.clone()
            for i in range(lows.shape[0]):
                for j in range(lows.shape[1]):
                    tile = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                    # What a tile lacks is filled up with zeros.
                    lows[i, j], highs[i, j] = tile.min(), tile.max()
            return lows, highs
    parts = x.unflatten(-1, (-1, args["group_size"]))
    return parts.amin(-1), parts.amax(-1)


if __name__ == "__main__":
    from safetensors.torch import save_file

    tensors = {}
    for name, (_, args) in WEIGHTS.items():
        if name not in ABSENT_IN_0_17:
            made = by_theirs(tensor(name), args)
            tensors[f"{name}.scale"] = made["scale"]
            # Codes times two are whole numbers of a byte, but for those of 8-bit floats.
            codes = made["codes"]
            tensors[f"{name}.codes"] = codes.to(E4M3) if args["type"] == "float" else codes.char()
            if not args.get("symmetric", True):
                tensors[f"{name}.zero_point"] = made["zero_point"].char()
            if "over" in made:
                tensors[f"{name}.over"] = made["over"]
    save_file({key: each.contiguous() for key, each in tensors.items()}, sys.argv[1])
