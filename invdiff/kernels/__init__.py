"""Kernels: a folder each, with a reference in plain PyTorch and faster versions of one signature for some devices."""
