"""One package per array library; `_dispatch` imports the one that a call needs."""
