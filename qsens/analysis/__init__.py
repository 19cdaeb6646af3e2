"""Ranking, stability, drift, agreement, audit verdicts: numbers in, numbers out, no torch."""
