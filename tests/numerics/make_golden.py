"""Record what ModelOpt's own GPU kernels make of hostile tensors, for ``tests/numerics``.

Needs a CUDA card of compute capability 8.9 or later, ``nvidia-modelopt``, a CUDA compiler (ModelOpt
builds its extensions at first use, a minute each) and Triton. From the root of the repository:

    python tests/numerics/make_golden.py

Each quantizer config in `FORMATS` is run by ModelOpt's ``TensorQuantizer`` in float32, bfloat16 and
float16 on the tensors of `make_tensors`. The file holds, by key:

    <dtype>/<tensor>                    the input
    <dtype>/<tensor>/<format>           the output, calibrated on the input itself
    <dtype>/plain/<format>/amax         half the calibrated maxima, where a format has any
    <dtype>/plain/<format>/clipped      the output under these, so that values saturate
    <dtype>/broken/<format>             the output for NaN and infinities, calibrated without them

and in its metadata, as JSON, the configs, the versions, the card, the seed and the date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")
BROKEN_ROWS = [8, 15, 18, 22]

Cfg = dict[str, Any]


def _channel(bits: Any) -> Cfg:
    return {"num_bits": bits, "axis": 0}


def _tensor(bits: Any) -> Cfg:
    return {"num_bits": bits, "axis": None}


def _token(bits: Any) -> Cfg:
    return {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}


def _group(bits: Any, size: int) -> Cfg:
    return {"num_bits": bits, "block_sizes": {-1: size, "type": "static"}}


def _mx(bits: Any) -> Cfg:
    return {
        "num_bits": bits,
        "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
    }


def _nvfp4(size: int) -> Cfg:
    return {
        "num_bits": (2, 1),
        "block_sizes": {-1: size, "type": "dynamic", "scale_bits": (4, 3)},
    }


E4M3 = (4, 3)
FORMATS: dict[str, Cfg] = {
    "fp8_tensor": _tensor(E4M3),
    "fp8_channel": _channel(E4M3),
    "fp8_token": _token(E4M3),
    "fp8_group64": _group(E4M3, 64),
    "fp8_group128": _group(E4M3, 128),
    "int8_tensor": _tensor(8),
    "int8_tensor_narrow": {**_tensor(8), "narrow_range": True},
    "int8_channel": _channel(8),
    "int8_token": _token(8),
    "int8_group64": _group(8, 64),
    "int8_group128": _group(8, 128),
    "int4_tensor": _tensor(4),
    "int4_channel": _channel(4),
    "int4_token": _token(4),
    "int4_group32": _group(4, 32),
    "int4_group64": _group(4, 64),
    "int4_group128": _group(4, 128),
    "mxfp4": _mx((2, 1)),
    "mxfp6": _mx((3, 2)),
    "mxfp8": _mx(E4M3),
    "mxint8": _mx(8),
    "nvfp4": _nvfp4(16),
    "nvfp4_block32": _nvfp4(32),
}


def make_tensors(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs by name.

    Args:
        seed: Of the random parts.
        dtype: float32, bfloat16 or float16; what it cannot hold becomes 0 or its largest value.

    Returns:
        ``plain`` (24, 256): zeros, zeros of either sign, tiny and huge rows, outliers, exact ties,
        powers of two. ``extreme`` (8, 256): subnormals, the largest values, maxima just at and
        around the powers where an MX scale changes. ``odd`` (6, 80): divides into no block size but
        16. ``batch`` (1, 5, 64): tokens. ``conv`` (4, 3, 2, 4, 4): a convolution's weight.
        ``broken`` (4, 256): `BROKEN_ROWS` of ``plain`` with NaN and infinities.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw).double()

    largest = torch.finfo(dtype).max
    columns = torch.arange(256).double()

    plain = normal(24, 256)
    plain[0] = 0
    plain[1] = -0.0
    plain[2, :128] = 0
    plain[3] *= 1e-30
    plain[4] *= 1e4
    plain[5] *= 1e-6
    plain[6] *= 2.0**-24  # around the maximum that counts as zero
    plain[7, 7] = 300.0
    plain[8, ::16] = 50.0
    plain[9] = torch.exp2(integers(-8, 8, 256))
    plain[10] = integers(-6, 7, 256) * 0.5
    plain[11] = integers(-12, 13, 256) * 0.25 + 0.125
    plain[12] = -plain[11]
    plain[13] = (columns % 33 - 16) * 0.4375
    plain[14] = 6.0
    plain[15] = columns - 128
    plain[16] = (columns - 128) / 2  # integers and ties for 8 bits: the maximum is 64
    plain[17] = (columns % 15 - 7) + 0.5 * (columns % 2)
    plain[18] = torch.rand(256, generator=draw).double() * 2 - 1
    plain[19, 0] = 6e4
    plain[20] = 448.0 * torch.exp2(-integers(0, 19, 256))
    plain[21] = integers(0, 16, 256) * 2.0**-10  # E4M3's subnormals and ties, under 448
    plain[21, 0] = 448.0

    extreme = normal(8, 256)
    block = columns // 32
    extreme[0] *= torch.finfo(dtype).smallest_normal / 4
    extreme[1] *= largest / 8
    extreme[2] = largest * torch.sign(extreme[2])
    # One exponent a block, from float32's subnormals up: all of a block or nothing is flushed.
    extreme[3] = torch.sign(extreme[3]) * (1 + columns % 16 / 16) * torch.exp2(3 * block - 133)
    extreme[4] = torch.sign(extreme[4]) * (1 + columns % 16 / 16) * torch.exp2(block - 125)
    for row, top, place in ((5, 6.0, 4), (6, 448.0, 256), (7, 127.0, 64)):
        extreme[row] = extreme[row].clamp(-1, 1) * top / 2
        # A block's maximum: the largest element, up to two units in the last place off.
        extreme[row, ::32] = top + place * torch.finfo(dtype).eps * (block[::32] % 5 - 2)
        extreme[row] *= torch.exp2(block - 4)

    tensors = {
        "plain": plain,
        "extreme": extreme,
        "odd": normal(6, 80),
        "batch": normal(1, 5, 64) * torch.exp2(integers(-4, 5, 1, 5, 1)),
        "conv": normal(4, 3, 2, 4, 4) * 0.02,
    }
    tensors = {name: x.clamp(-largest, largest).to(dtype) for name, x in tensors.items()}
    broken = tensors["plain"][BROKEN_ROWS].clone()
    broken[0, 3], broken[1, 70], broken[2, 140], broken[3, 200] = float("nan"), INF, -INF, INF
    tensors["broken"] = broken
    return tensors


def calibrated(cfg: Cfg, x: Tensor) -> Any:
    """Return ModelOpt's quantizer for ``cfg``, calibrated on ``x`` where it needs to be."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(**cfg)).to(x.device)
    if cfg.get("type") == "dynamic" or quantizer.is_mx_format:
        return quantizer
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(x)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    return quantizer


@torch.no_grad()
def record(formats: dict[str, Cfg], seed: int, device: str) -> dict[str, Tensor]:
    """Return inputs and ModelOpt's outputs by the keys that the module's docstring lists."""
    golden: dict[str, Tensor] = {}
    for dtype in DTYPES:
        prefix = str(dtype).removeprefix("torch.")
        for name, x in make_tensors(seed, dtype).items():
            golden[f"{prefix}/{name}"] = x
            for label, cfg in formats.items():
                per_token = cfg.get("type") == "dynamic"
                # ModelOpt asserts on the device when a token's maximum is NaN, and leaves its
                # kernels when tokens have more than one dimension.
                if per_token and name in ("broken", "conv"):
                    continue
                # A quantizer of static blocks takes one shape only, hence a new one each time.
                finite = golden[f"{prefix}/plain"][BROKEN_ROWS]
                reference = finite if name == "broken" else x
                quantizer = calibrated(cfg, reference.to(device))
                golden[f"{prefix}/{name}/{label}"] = _host(quantizer(x.to(device)))
                if name == "plain" and not per_token and quantizer.amax is not None:
                    quantizer.amax = quantizer.amax * 0.5
                    golden[f"{prefix}/{name}/{label}/amax"] = _host(quantizer.amax)
                    golden[f"{prefix}/{name}/{label}/clipped"] = _host(quantizer(x.to(device)))
    return golden


def _host(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().clone()


def main() -> int:
    """Write the file; return the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=HERE / "golden.safetensors")
    parser.add_argument("--seed", type=int, default=20261125)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make_golden: no CUDA device; ModelOpt's kernels run on one only.", file=sys.stderr)
        return 2

    import modelopt
    from safetensors.torch import save_file

    golden = record(FORMATS, args.seed, "cuda")
    about = {
        "formats": FORMATS,
        "seed": args.seed,
        "modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "card": torch.cuda.get_device_name(0),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    save_file(golden, args.out, metadata={"about": json.dumps(about)})
    print(f"{args.out}: {len(golden)} tensors, {args.out.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
