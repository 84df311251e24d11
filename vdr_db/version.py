"""Version of this library, in a file of its own so that every room can read it."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
