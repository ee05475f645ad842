"""Buffers and tasks of a network for inputs of one shape, and the kernels in C that execute them."""
