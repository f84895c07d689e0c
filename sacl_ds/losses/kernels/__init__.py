"""Triton kernels of the losses: on CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
