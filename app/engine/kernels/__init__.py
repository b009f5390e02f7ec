"""Kernels of our own, written in Triton, each beside the same arithmetic in torch."""
