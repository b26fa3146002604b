"""Benchmarks of dcnops against its peers: every result is checked before it is timed. See `python -m benchmarks -h`."""
