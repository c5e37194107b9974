"""Triton kernels, one idea a file: a kernel, its launcher, and its formula with the bytes it moves.

`attrfast.kernels.backend` puts them together as a backend; the others must not know it. How tensors are
cut into tiles, and in which order sums are taken, is told in `attrfast.kernels.tiles`. The meaning of
every op is `attrfast.reference`.

Byte counts take e for the bytes of an element and T for the number of elements of one tensor.
"""
