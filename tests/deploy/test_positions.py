"""Index gaps in a Rice code: every set of positions comes back, in about as few bytes as there can be."""

import numpy as np
import pytest

from str_triton.deploy import positions


def round_trip(indices: np.ndarray) -> int:
    """Bytes per index."""
    low_bits, data = positions.encode(indices)
    assert np.array_equal(positions.decode(low_bits, len(indices), data, indices.max(initial=-1) + 1), indices)
    return data.size


@pytest.mark.parametrize(
    "indices",
    [[], [0], [5], [10**6], [0, 1, 2], [0, 10**6], [7, 8, 9, 15, 16, 17, 63, 64, 10**5], range(0, 1000, 8)],
    ids=str,
)
def test_edges(indices: list[int]):
    round_trip(np.array(list(indices), np.int64))


def test_gaps_of_more_than_32_bits():
    round_trip(np.array([3, 5 * 2**32, 9 * 2**32 + 1], np.int64))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.9, 1.0])
def test_random_positions_take_little_more_than_their_entropy(density: float):
    rng = np.random.default_rng(0)
    size = 200_000
    indices = np.flatnonzero(rng.random(size) < density)
    used = 8 * round_trip(indices) / size
    entropy = -sum(p * np.log2(p) for p in (density, 1 - density) if p)
    assert used <= (1.05 * entropy + 0.001 if density < 0.4 else 1)


def test_the_best_number_of_low_bits_is_taken():
    """Few gaps are long: a first guess from their mean would be far too high."""
    rng = np.random.default_rng(0)
    indices = np.cumsum(np.where(rng.random(5000) < 0.001, 50_000, rng.integers(1, 4, 5000)))
    low_bits, data = positions.encode(indices)
    gaps = np.diff(indices, prepend=-1) - 1
    sizes = [len(gaps) * (k + 1) + (gaps >> k).sum() for k in range(20)]
    assert low_bits == np.argmin(sizes)
    assert data.size == -(-len(gaps) * low_bits // 8) + -(-(min(sizes) - len(gaps) * low_bits) // 8)
    round_trip(indices)


def test_many_chunks(monkeypatch: pytest.MonkeyPatch):
    indices = np.flatnonzero(np.random.default_rng(0).random(5000) < 0.1)
    whole = positions.encode(indices)
    monkeypatch.setattr(positions, "CHUNK", 8)
    low_bits, data = positions.encode(indices)
    assert low_bits == whole[0] > 0
    assert np.array_equal(data, whole[1])
    round_trip(indices)


@pytest.mark.parametrize(
    ("low_bits", "count", "data", "elements"),
    [
        (0, 2, [0b0001], 8),  # a one too few
        (0, 2, [0b0111], 8),  # a one too many
        (0, 2, [0b1001], 3),  # beyond the elements
        (3, 1, [0b0111, 0b0001], 7),
        (3, 1, [0, 0b1000], 8),
        (62, 3, [0xFF] * 24 + [0b111], 2**62),  # the sum does not fit into 64 bits
    ],
)
def test_what_are_no_positions_is_refused(low_bits: int, count: int, data: list[int], elements: int):
    with pytest.raises(ValueError, match="positions"):
        positions.decode(low_bits, count, np.array(data, np.uint8), elements)
