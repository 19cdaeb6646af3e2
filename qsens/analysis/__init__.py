"""Ranking, stability, drift, allocation: numbers in, numbers out, no torch."""
