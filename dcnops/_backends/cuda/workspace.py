"""Limit of the scratch memory of a call."""

WORKSPACE_BYTES = 32 * 2**20
"""Scratch memory that a call of any operation keeps within, in bytes: it then stays in the L2 cache of a large GPU.

One image, or one bin of a region, is the least that is processed at a time and may need more.
"""
