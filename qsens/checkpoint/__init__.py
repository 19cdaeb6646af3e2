"""A checkpoint: its files and digests, structure, groups, experts, loading."""
