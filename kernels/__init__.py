"""Triton kernels, installed as `attrfast.kernels`. None are written yet; the CPU's are in csrc/."""
