"""Where adapters' content lies, by version: a folder or a bucket that every node reads. Imports no torch."""
