"""Every kind of array into every argument of every public call: `python -m tests.fuzz`."""
