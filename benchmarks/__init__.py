"""Measurements of attrfast beside other ways to score filters: `python -m benchmarks`.

What is measured and how is told in `benchmarks/README.md`; the latest figures lie in
`benchmarks/results/`.
"""
