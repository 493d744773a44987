"""Triton kernels for one GPU, one family a file. Importing one needs triton: only a backend that is chosen does so."""
