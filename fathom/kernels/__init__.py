"""Kernels of our own for where time is lost between operators: compiled on the machine, torch where they cannot be."""
