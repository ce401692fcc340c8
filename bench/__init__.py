"""The asv suite: `asv run --quick --python=same`. Every class checks its result before it times it."""
