"""A/B experiments on what a model name means: who gets which arm, what came of it, and what follows from that.

Everything here decides and computes; the registry keeps it, and the gateway carries it out.
"""
