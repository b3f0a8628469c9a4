"""Loom on Ray Serve: the gateway, the engine replicas, the registry, the command line.

Ray's own package of this name is imported as ``from ray import serve as ray_serve``.
"""
