"""NumPy arrays: compiled loops on the CPU's cores."""
