"""Bytes of packed weights: by hand, and what compressed-tensors really writes."""

from __future__ import annotations

import pytest

from qsens.config import PairConfig, load_sweep
from qsens.recipes.sizes import packed_bytes, plain_bytes

SERVING = {
    f"{pair.name}-{granularity.name}": pair.with_granularity(granularity)
    for pair, granularity in load_sweep("serving").config.formats
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 64 x 64: codes, then scales of two bytes.
        ("wint8_aint8-ct_token", 4096 + 64 * 2),
        ("wint8_aint8-ct", 4096 + 64 * 2 + 4),
        ("wint8_afp16-ct_channel", 4096 + 16 + 64 * 2),
        ("wfp8_afp8-ct", 4096 + 4 + 4),
        ("wfp8_afp8-ct_block128", 4096 + 2),
        ("wmxfp8_amxfp8-ct", 4096 + 64 * 2),
        ("wfp4_afp16-ct", 2048 + 64 * 2),
        ("wnvfp4_afp16-ct", 2048 + 64 * 4 + 4),
        ("wnvfp4_anvfp4-ct", 2048 + 64 * 4 + 4 + 4),
        ("wint4_afp16-ct_group32", 2048 + 16 + 64 * 2 * 2),
    ],
)
def test_by_hand(name: str, expected: int) -> None:
    assert packed_bytes((64, 64), SERVING[name], 2) == expected


def test_a_channel_of_64_columns_pays_a_quarter_bit_for_its_scale() -> None:
    bits = 8 * packed_bytes((64, 64), SERVING["wint8_aint8-ct_token"], 2) / 4096
    assert bits == 8.25
    assert plain_bytes((3, 5), 4) == 60


@pytest.mark.parametrize("shape", [(192, 256), (24, 384), (7, 128)], ids=str)
@pytest.mark.parametrize("name", SERVING)
def test_it_is_what_is_written(name: str, shape: tuple[int, int]) -> None:
    pytest.importorskip("compressed_tensors")
    import torch

    from qsens.export.packed_weight import pack

    pair: PairConfig = SERVING[name]
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        written = pack(weight, pair, inputs=torch.tensor(1.0))
        total = sum(each.numel() * each.element_size() for each in written.values())
        assert packed_bytes(shape, pair, dtype.itemsize) == total
