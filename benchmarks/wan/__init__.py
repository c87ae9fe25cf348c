"""Parts of `benchmarks/wan.py`."""
