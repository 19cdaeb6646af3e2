"""Scores from gradients: `gradient` (ModelOpt's formula) and `fisher`."""
