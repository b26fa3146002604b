"""Backend for NumPy arrays: compiled loops on the CPU."""
