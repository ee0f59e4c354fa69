"""The benchmarks: `python bench/run.py`."""
