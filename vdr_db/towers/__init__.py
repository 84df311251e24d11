"""Encoder bodies and heads: ids or pixels to pooled scores."""
