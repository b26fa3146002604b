"""Checked first, then timed: dcnops beside its peers in one run. `python -m benchmarks --help` says how."""
