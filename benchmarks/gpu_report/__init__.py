"""What compilers make of the GPU kernels, read from the machine code: `python -m benchmarks.gpu_report`.

Needs no GPU, and says nothing of time. Each backend has a module here with a function `rows`; what is
found is merged by `__main__.py`.
"""
