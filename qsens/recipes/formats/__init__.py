"""Recipes as other tools read them; no torch."""
