"""Training on texts and images together."""
