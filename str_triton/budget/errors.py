"""The error of a controller whose model has diverged."""


class DivergedError(ValueError):
    """A matrix has no finite singular values: its weights are NaN, infinite or too large."""
