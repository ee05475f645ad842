"""The error of a controller whose model has diverged."""


class DivergedError(ValueError):
    """No budget can be met: weights or thresholds are NaN or infinite, or too large for their singular values."""
