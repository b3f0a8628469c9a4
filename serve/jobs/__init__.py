"""Long work on Ray tasks: merges."""
