"""Trainings that led to the defaults, and searches for faults."""
