"""The counter-based random numbers: the published hash, uniform, and independent of everything but their counter."""

import pytest
import torch

from str_triton.cnn.data.counter_random import bits, permutation, uniforms

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 7), (-3, 2), (2**63 + 5, 1), (10**30, 1)])
def test_bits_are_splitmix64_in_exact_integers(seed: int, epoch: int):
    key = splitmix64((splitmix64(seed & MASK) + (epoch + 1) * GOLDEN) & MASK)
    indices = torch.tensor([0, 1, 59_999, 2**40])
    for draw in (0, 1, 5):
        expected = [
            splitmix64((splitmix64((key + (i + 1) * GOLDEN) & MASK) + (draw + 1) * GOLDEN) & MASK)
            for i in indices.tolist()
        ]
        assert [value & MASK for value in bits(seed, epoch, indices, torch.tensor(draw)).tolist()] == expected


def test_splitmix64_gives_the_published_sequence():
    """The first outputs for seed 0, as the reference C code prints them: the oracle above is the real thing."""
    assert [splitmix64(i * GOLDEN & MASK) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (12345, 99)])
def test_uniforms_are_uniform_and_uncorrelated(seed: int, epoch: int):
    count = 20_000
    draws = uniforms(seed, epoch, torch.arange(count), 4)
    assert draws.shape == (4, count)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    for row in draws:
        cells = torch.bincount((row * 50).long(), minlength=50)
        chi_squared = ((cells - count / 50) ** 2 / (count / 50)).sum()
        assert 20 < chi_squared < 90  # 49 degrees of freedom: mean 49, standard deviation 10
    neighbours = torch.cat([draws, draws.roll(1, dims=1)])
    other_epoch = uniforms(seed, epoch + 1, torch.arange(count), 4)
    other_seed = uniforms(seed + 1, epoch, torch.arange(count), 4)
    correlations = torch.corrcoef(torch.cat([neighbours, other_epoch, other_seed])) - torch.eye(16)
    assert correlations.abs().max() < 5 / count**0.5


def test_uniforms_do_not_depend_on_the_other_indices():
    draws = uniforms(3, 2, torch.arange(100), 5)
    assert torch.equal(uniforms(3, 2, torch.tensor([42, 7]), 5), draws[:, [42, 7]])
    assert torch.equal(uniforms(3, 2, torch.arange(100), 3), draws[:3])
    assert uniforms(3, 2, torch.arange(0), 3).shape == (3, 0)


def test_permutations_differ_by_seed_and_epoch_and_move_the_images():
    orders = [permutation(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
        assert torch.corrcoef(torch.stack([order, torch.arange(1000)]).double())[0, 1].abs() < 0.15
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 10
    assert torch.equal(permutation(1000, 1, 1), orders[-1])
