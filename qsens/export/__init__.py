"""Packed checkpoints from recipes, in the layouts that servers load. Needs torch."""
