"""Fake quantization of tensors in plain torch, equal to what ModelOpt's GPU kernels compute."""

from qsens.numerics.quantize import compute_amax, fake_quantize, is_dynamic, supports

__all__ = ["compute_amax", "fake_quantize", "is_dynamic", "supports"]
