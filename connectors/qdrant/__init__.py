"""The store over Qdrant: embedded engine or server."""
