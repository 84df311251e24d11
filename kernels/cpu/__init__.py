"""The operations on the CPU."""
