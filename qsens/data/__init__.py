"""Samples: captions, records and images, from files to tokens."""
