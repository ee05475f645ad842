"""Rice coding of the positions of the stored elements in a flat tensor, by the gaps between them.

A gap g is the number of elements left out before a stored one. It is coded as g mod 2^k in k bits of a first stream,
and as g >> k zeros and a one in a second stream. Two streams can be decoded without a loop. For k = 0 the second stream
is a bitmask.
Source: R. F. Rice, Some practical universal noiseless coding techniques, JPL Publication 79-22, 1979.
"""

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20  # elements in a chunk; a multiple of 8, so that every chunk begins at a byte


def encode(indices: NDArray[np.int64]) -> tuple[int, NDArray[np.uint8]]:
    """Encode rising indices [m] with the k that takes the fewest bytes. Return k and the bytes of both streams."""
    if not len(indices):
        return 0, np.empty(0, np.uint8)
    gaps = np.diff(indices, prepend=-1) - 1
    low_bits, size = 0, _size(gaps, 0)
    # The size is convex in k: each further bit saves at most as many zeros as the bit before.
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
    """Return the `count` rising indices below `elements` that `encode` has encoded.

    The caller ensures that `low_bits` is between 0 and log2(elements), and that `data` hold count * low_bits bits.
    Raises ValueError if the data do not encode such indices.
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
    # No gap is longer than twice the elements, so a sum that overflows becomes negative first.
    if count and (indices.min() < 0 or indices.max() >= elements):
        raise ValueError(f"positions beyond the {elements:,} elements")
    return indices


def _size(gaps: NDArray[np.int64], low_bits: int) -> int:
    """Return the size in bits for this k."""
    return len(gaps) * (low_bits + 1) + int((gaps >> low_bits).sum())
