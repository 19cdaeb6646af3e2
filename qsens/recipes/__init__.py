"""From scores to a decision: format choices, allocation, score correction; no torch."""
