"""Merging adapters into one: spaces that deltas are merged in, and the rules that merge them. Pure arithmetic."""
