"""Tokenization, and which column means which token."""
