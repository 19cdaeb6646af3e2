from __future__ import annotations

import pytest

from qsens.errors import UserError
from qsens.numerics.floats import E2M1, E3M2, E4M3
from qsens.numerics.formats import Format, Sharing
from qsens.numerics.integers import Integer


def blocks(size, kind="dynamic", scale=(8, 0)):
    return {-1: size, "type": kind, "scale_bits": scale}


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({}, Format(Integer(8), Sharing.DIMS, kept=())),
        ({"num_bits": (4, 3), "axis": None}, Format(E4M3, Sharing.DIMS, kept=())),
        ({"num_bits": [4, 3], "axis": 0}, Format(E4M3, Sharing.DIMS, kept=(0,))),
        ({"num_bits": 8, "axis": [0, -1]}, Format(Integer(8), Sharing.DIMS, kept=(0, -1))),
        (
            {"num_bits": 4, "type": "dynamic", "block_sizes": {"-1": None}},
            Format(Integer(4), Sharing.DIMS, dynamic=True, shared=(-1,)),
        ),
        (
            {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
            Format(Integer(4), Sharing.BLOCKS, size=128),
        ),
        (
            {"num_bits": (4, 3), "block_sizes": {"-1": 64}},
            Format(E4M3, Sharing.BLOCKS, size=64),
        ),
        (
            {"num_bits": 8, "narrow_range": True},
            Format(Integer(8, narrow=True), Sharing.DIMS, kept=()),
        ),
        (
            {"num_bits": (2, 1), "block_sizes": blocks(32)},
            Format(E2M1, Sharing.MX, dynamic=True, size=32),
        ),
        (
            {"num_bits": [3, 2], "block_sizes": blocks(32, scale=[8, 0])},
            Format(E3M2, Sharing.MX, dynamic=True, size=32),
        ),
        (
            {"num_bits": 8, "block_sizes": blocks(16)},
            Format(Integer(8), Sharing.MX, dynamic=True, size=16),
        ),
        (
            {"num_bits": (2, 1), "block_sizes": blocks(32, scale=(4, 3))},
            Format(E2M1, Sharing.NVFP4, size=32),
        ),
    ],
)
def test_what_a_cfg_says(cfg, expected):
    assert Format.from_cfg(cfg) == expected


def test_keys_that_change_no_number():
    cfg = {"num_bits": (4, 3), "axis": None}
    neutral = {"enable": True, "effective_bits": 8.5, "backend": "mine", "calibrator": "max"}
    assert Format.from_cfg({**cfg, **neutral}) == Format.from_cfg(cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        {"num_bits": (5, 2), "block_sizes": blocks(32)},
        {"num_bits": (2, 1)},
        {"num_bits": 1},
        {"num_bits": 16},
        {"num_bits": "nf4"},
        {"num_bits": 8, "axis": 0, "block_sizes": {-1: 64}},
        {"num_bits": 4, "block_sizes": {-1: 128, -2: 128}},
        {"num_bits": 4, "block_sizes": {-2: 128}},
        {"num_bits": 4, "block_sizes": {-1: 64, "scale_bits": 8, "scale_block_sizes": {-1: 256}}},
        {"num_bits": (2, 1), "block_sizes": blocks(16, "static", (4, 3))},
        {"num_bits": (2, 1), "block_sizes": {**blocks(16, scale=(4, 3)), "four_over_six": True}},
        {"num_bits": (2, 1), "block_sizes": blocks(64)},
        {"num_bits": 4, "block_sizes": blocks(32)},
        {"num_bits": (4, 3), "block_sizes": blocks(16, scale=(4, 3))},
        {"num_bits": 8, "unsigned": True},
        {"num_bits": 8, "calibrator": "histogram"},
        {"num_bits": 8, "bias": {-1: None}},
        {"num_bits": 8, "rotate": True},
        {"num_bits": 8, "fake_quant": False},
        {"num_bits": 8, "unheard_of": 1},
    ],
)
def test_what_is_not_computed_is_refused(cfg):
    with pytest.raises(UserError, match="not a quantizer config") as refused:
        Format.from_cfg(cfg)
    assert refused.value.remedy
    assert repr(cfg["num_bits"]) in refused.value.where


@pytest.mark.parametrize(
    ("cfg", "shared"),
    [
        ({"axis": None}, (0, 1, 2)),
        ({"axis": 0}, (1, 2)),
        ({"axis": -1}, (0, 1)),
        ({"axis": (0, 1)}, (2,)),
        ({"block_sizes": {-1: None}}, (2,)),
        ({"block_sizes": {-1: None, -3: None}}, (0, 2)),
    ],
)
def test_which_dimensions_share(cfg, shared):
    assert Format.from_cfg(cfg).shared_dims(3) == shared


def test_a_dimension_that_is_not_there():
    with pytest.raises(UserError, match=r"dimensions \(3,\), the tensor has 2"):
        Format.from_cfg({"axis": 3}).shared_dims(2)
