"""Generators of tokens: raster order with a cache that drops duplicates, and random order."""
