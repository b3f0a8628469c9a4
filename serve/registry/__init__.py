"""The registry: which adapters there are, in a database that outlives every process."""
