"""Engines: what holds the base and serves adapters on it."""
