"""Measured KL divergence: forward passes with one group quantized."""
