"""The structs of kernels.c."""

import ctypes

import numpy as np

CONVOLUTION, MAX_POOL, COPY, MEAN, LINEAR, TURN, GATE = range(7)


class View(ctypes.Structure):
    """A tensor: a pointer to float32 and strides in floats."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("image", "channel", "plane", "row", "column")),
    ]


class Operation(ctypes.Structure):
    """One kernel's work."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("items", ctypes.c_int64),
        *((name, View) for name in ("x", "y", "residual")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "planes", "length", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("tiles", "blocks", "width", "tables")),
        *((name, ctypes.c_void_p) for name in ("taps", "first", "block_first", "bias", "mask")),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("activation", ctypes.c_int64),
        ("slope", ctypes.c_float),
    ]


class Stage(ctypes.Structure):
    """Operations that wait for nobody."""

    _fields_ = [("operations", ctypes.c_void_p), ("count", ctypes.c_int64)]


TAP = np.dtype([("value", np.float32), ("offset", np.int32)])
