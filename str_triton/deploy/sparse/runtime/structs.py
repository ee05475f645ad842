"""The structs of kernels.c."""

import ctypes

import numpy as np

CONVOLUTION, MAX_POOL, COPY, MEAN, LINEAR, TURN, GATE = range(7)
CONVOLUTION_BYTES, MAX_POOL_BYTES, COPY_BYTES, MEAN_BYTES, LINEAR_BYTES, QUANTIZE, DEQUANTIZE, GATE_BYTES = range(7, 15)


class View(ctypes.Structure):
    """A tensor: a pointer to float32 or to bytes, and strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("image", "channel", "plane", "row", "column")),
    ]


class Integers(ctypes.Structure):
    """The numbers of an operation on bytes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("factors", "table")),
        *((name, ctypes.c_float) for name in ("residual", "scale")),
        *((name, ctypes.c_int32) for name in ("zero_x", "zero_y", "zero_residual", "fill")),
    ]


class Operation(ctypes.Structure):
    """The work of one kernel."""

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
        ("codes", ctypes.c_void_p),
    ]


class Stage(ctypes.Structure):
    """Operations that do not depend on each other."""

    _fields_ = [("operations", ctypes.c_void_p), ("count", ctypes.c_int64)]


TAP = np.dtype([("value", np.float32), ("offset", np.int32)])
QUAD = np.dtype([("offset", np.int32, 4), ("weights", np.int8, 4)])
BYTE_TAP = np.dtype([("weight", np.int32), ("offset", np.int32)])
