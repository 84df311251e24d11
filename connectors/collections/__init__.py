"""Collections: an encoder with a store; what most callers use."""
