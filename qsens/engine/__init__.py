"""The engine: amax, candidates, quantized weights and inputs, activations, scores.

Importing this package imports nothing heavy; its modules say whether they need torch.
"""
