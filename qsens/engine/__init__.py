"""The engine: checkpoint, samples, groups, calibration and scores.

Importing this package imports nothing heavy; its modules say whether they need torch.
"""
