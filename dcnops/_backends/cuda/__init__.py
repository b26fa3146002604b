"""Backend for CuPy arrays: launch plans and the engine that runs them.

Only `backend`, `cupy_engine` and `cublas` import CuPy.
"""
