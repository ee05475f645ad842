"""Kernels in C for the CPU: their source, and the library that the system's compiler makes of it."""
