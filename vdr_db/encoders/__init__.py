"""Texts and images to `SparseRows`."""
