"""Recipes of mixed precision, and the files that other tools take them as. No torch."""
