"""Batch normalization of arrays on the host."""
