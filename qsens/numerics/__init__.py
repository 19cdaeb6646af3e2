"""Fake quantization of tensors, equal to what ModelOpt's GPU kernels compute.

Plain torch says what a format is, on every device; on a GPU two kernels give the same bits faster.
"""

from qsens.numerics.quantize import compute_amax, fake_quantize, fake_quantize_each, supports

__all__ = ["compute_amax", "fake_quantize", "fake_quantize_each", "supports"]
