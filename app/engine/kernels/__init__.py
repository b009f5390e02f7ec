"""Kernels of our own, written in Triton, each beside the same arithmetic in torch.

Triton comes with torch's build for CUDA, in the version that torch pins. Gluon, launches of
compiled kernels and `warp_specialize` are not official: with another Triton they may fail, and are
tried.
"""
