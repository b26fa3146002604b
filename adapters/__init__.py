"""Deformable operations for array frameworks: thin layers over the array functions of `dcnops`."""
