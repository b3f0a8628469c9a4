"""Loom's runtime: adapters as one in-memory form, and the engines that serve them.

This package knows neither Ray nor HTTP. Nothing is imported here, so that the
gateway process can read ``lora_runtime.errors`` and ``lora_runtime.engine.protocol``
without importing torch.
"""
