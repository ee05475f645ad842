"""Where the stored elements of a flat tensor stand: the gaps between them in a Rice code; a bitmask is its case k = 0.

A gap g, the elements left out before a stored one, is g mod 2^k in k bits, and g >> k zeros and a one in a stream of
their own, so that both streams are read without a loop. At k = 0 the second one is the bitmask itself.
Source: R. F. Rice, Some practical universal noiseless coding techniques, JPL Publication 79-22, 1979.
"""

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20  # elements; a multiple of 8, so that every chunk begins at a byte


def encode(indices: NDArray[np.int64]) -> tuple[int, NDArray[np.uint8]]:
    """Rising indices [m] as (k, bytes), with the k that takes the fewest bytes: low bits first, then the ones."""
    if not len(indices):
        return 0, np.empty(0, np.uint8)
    gaps = np.diff(indices, prepend=-1) - 1
    low_bits, size = 0, _size(gaps, 0)
    # The size is convex in k: each further bit saves at most as many zeros as the one before.
    while (next_size := _size(gaps, low_bits + 1)) < size:
        low_bits, size = low_bits + 1, next_size
    ones = np.cumsum((gaps >> low_bits) + 1) - 1
    stream = np.zeros(ones[-1] + 1, np.uint8)
    stream[ones] = 1
    shifts = np.arange(low_bits)
    low = [
        np.packbits((gaps[begin : begin + CHUNK, None] >> shifts & 1).astype(np.uint8), bitorder="little")
        for begin in range(0, len(gaps), CHUNK)
    ]
    return low_bits, np.concatenate([*low, np.packbits(stream, bitorder="little")])


def decode(low_bits: int, count: int, data: NDArray[np.uint8], elements: int) -> NDArray[np.int64]:
    """Return the `count` rising indices below `elements` that `encode` wrote.

    Raises ValueError where the data hold no such indices. low_bits: 0 to log2(elements); data: long enough for them.
    """
    size = -(-count * low_bits // 8)
    stream = np.unpackbits(data[size:], bitorder="little")
    if np.count_nonzero(stream) != count:
        raise ValueError(f"not the positions of {count:,} values")
    quotients = np.diff(np.flatnonzero(stream), prepend=-1) - 1
    if quotients.max(initial=0) > elements >> low_bits:
        raise ValueError(f"positions beyond the {elements:,} elements")
    gaps = quotients << low_bits
    for begin in range(0, count if low_bits else 0, CHUNK):
        part = data[begin * low_bits // 8 : size]
        number = min(CHUNK, count - begin)
        bits = np.unpackbits(part, count=number * low_bits, bitorder="little").reshape(number, low_bits)
        for bit in range(low_bits):
            gaps[begin : begin + number] += bits[:, bit].astype(np.int64) << bit
    indices = np.cumsum(gaps + 1) - 1
    # No gap is longer than twice the elements, so that a sum that overflows is negative first.
    if count and (indices.min() < 0 or indices.max() >= elements):
        raise ValueError(f"positions beyond the {elements:,} elements")
    return indices


def _size(gaps: NDArray[np.int64], low_bits: int) -> int:
    """Bytes at this k, to the bit that begins one."""
    return len(gaps) * (low_bits + 1) + int((gaps >> low_bits).sum())
