"""Each op timed beside the baselines it has to beat: ``python -m benchmarks [op ...]``."""
