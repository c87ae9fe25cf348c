"""Real processes under real faults: what `benchmarks/chaos.py` and `benchmarks/survivors.py` have in common."""
