"""Triton kernels, one file a family, each with its launchers and block sizes; this import does not import Triton."""
