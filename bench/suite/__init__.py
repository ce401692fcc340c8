"""The asv suite, and the table of shapes that all benchmarks share. Every class checks its result before it times it.

asv imports this folder as the package `suite`, where nothing but fastbn, NumPy and ml_dtypes is installed: its imports
are relative.
"""
