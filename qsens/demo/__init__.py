"""A tiny vision-language checkpoint and the captions that it is trained and calibrated on.

Nothing is imported here: reading captions must not cost an import of torch.
"""
