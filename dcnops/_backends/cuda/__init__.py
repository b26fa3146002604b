"""Backend of CuPy arrays: launch plans and the engine that runs them. Only `backend` imports CuPy."""
