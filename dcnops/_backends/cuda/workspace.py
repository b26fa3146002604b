"""Limit of the scratch memory of a call."""

WORKSPACE_BYTES = 32 * 2**20
"""Limit of the scratch memory of a call, in bytes, for all operations: it then stays in the L2 cache of a large GPU.

The smallest unit of work, one image or one bin of a region, may need more.
"""
