"""Batch normalization of arrays on a GPU."""
