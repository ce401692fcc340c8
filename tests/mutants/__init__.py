"""Do the tests notice a wrong line? `python -m tests.mutants` tells."""
