"""Backend of NumPy arrays: compiled loops on the CPU."""
