"""Weights of convolutions on integers in quads, as integers.h takes them."""

from typing import NamedTuple

import numpy as np

from str_triton.deploy.sparse.runtime.operations import nonzeros

# AVX2 adds the products of two weights and two bytes in signed 16 bits: 255 * 128 and its negative still fit.
LARGEST_PAIR = 128


class Quads(NamedTuple):
    """The weights that are not zero, four by four.

    Attributes:
        first: [channels + 1]: where each output channel's quads begin.
        places: [quads, 4]: the positions of the weights in the input of all groups, [inputs, kernel].
        weights: [quads, 4] int8; a quad with fewer weights is filled with zeros.
    """

    first: np.ndarray
    places: np.ndarray
    weights: np.ndarray


def quads(weight: np.ndarray, groups: int) -> Quads:
    """Arrange the weights so that the products of two neighbours with bytes fit into 16 bits.

    In each channel the largest weight is paired with the smallest, the second largest with the second smallest, and so
    on: two weights of different signs always fit. A pair that does not fit becomes two pairs with a zero each.
    """
    channels = weight.shape[0]
    first, places, values = nonzeros(weight, groups)
    channel = np.repeat(np.arange(channels), np.diff(first))
    order = np.lexsort((values, channel))
    places, values = places[order], values[order].astype(np.int64)
    rank = np.arange(len(values)) - first[:-1][channel]
    count = np.diff(first)[channel]
    low = np.flatnonzero(2 * rank + 1 <= count)  # the smaller half of each channel, with the middle one
    high = first[:-1][channel[low]] + count[low] - 1 - rank[low]
    a, b = values[low], values[high]
    positive, negative = np.maximum(a, 0) + np.maximum(b, 0), np.minimum(a, 0) + np.minimum(b, 0)
    fits = (positive <= LARGEST_PAIR) & (negative >= -LARGEST_PAIR) & (low != high)
    alone = np.unique(np.concatenate([low[~fits], high[~fits]]))
    owner = np.concatenate([channel[low[fits]], channel[alone]])
    left = np.concatenate([low[fits], alone])
    right = np.concatenate([high[fits], alone])
    second = np.concatenate([values[high[fits]], np.zeros(len(alone), np.int64)])
    return _two_by_two(channels, owner, np.stack([places[left], places[right]], 1), np.stack([values[left], second], 1))


def _two_by_two(channels: int, owner: np.ndarray, places: np.ndarray, weights: np.ndarray) -> Quads:
    """Join the pairs of each channel, [pairs, 2], into quads."""
    order = np.lexsort(
        (places[:, 0], owner)
    )  # The order of the image: pixels of one cache line are read one after the other.
    owner, places, weights = owner[order], places[order], weights[order]
    pairs = np.bincount(owner, minlength=channels)
    halves = -(-pairs // 2)
    first = np.concatenate([[0], np.cumsum(halves)])
    begins = np.concatenate([[0], np.cumsum(pairs)])[:-1]
    slots = 2 * first[:-1][owner] + np.arange(len(owner)) - begins[owner]
    made = Quads(first, np.zeros((2 * first[-1], 2), np.int64), np.zeros((2 * first[-1], 2), np.int8))
    made.places[slots], made.weights[slots] = places, weights
    empty = np.setdiff1d(np.arange(2 * first[-1]), slots)
    made.places[empty] = made.places[empty - 1]  # A zero reads where its neighbours do.
    return Quads(first, made.places.reshape(-1, 4), made.weights.reshape(-1, 4))
