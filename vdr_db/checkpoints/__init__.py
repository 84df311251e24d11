"""Model folders and the parts that are in them."""
