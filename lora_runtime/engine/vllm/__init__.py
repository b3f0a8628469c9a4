"""The vLLM engine: Loom's slot layers inside vLLM's model, behind the protocol of every engine."""
