"""HTTP: OpenAI's API and Loom's own. This process never imports torch."""
