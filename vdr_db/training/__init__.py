"""Training of sparse encoders: losses, data, and a trainer for a CPU, a GPU or many."""
