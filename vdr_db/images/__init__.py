"""Image files: finding, reading and preparing them."""
