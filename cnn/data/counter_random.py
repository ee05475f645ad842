"""Counter-based random numbers: each is a hash of its position, so it can be computed alone and in any order.

The hash is splitmix64 (Steele, Lea, Flood, 2014). Number d of image i is mix(mix(key + i G) + d G), with the odd
constant G and a key computed in the same way from (seed, epoch). int64 products wrap, so arithmetic is modulo 2^64.
"""

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Return the int64 that has the bits of `number` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Shift right logically. The operator >> of int64 would fill with the sign bit."""
    return (x >> count) & (2 ** (64 - count) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _FACTOR_1
    x = (x ^ _shift_right(x, 27)) * _FACTOR_2
    return x ^ _shift_right(x, 31)


def bits(seed: int, epoch: int, indices: Tensor, draws: Tensor) -> Tensor:
    """Return 64 random bits, int64, for each index and draw (int64, broadcast). Any Python int can be the seed."""
    key = _mix(_mix(torch.tensor(_signed(seed))) + _signed((epoch + 1) * _GOLDEN))
    return _mix(_mix(key + (indices + 1) * _GOLDEN) + (draws + 1) * _GOLDEN)


def uniforms(seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each of `indices`, int64 [B]: float32 [count, B], multiples of 2^-24."""
    drawn = bits(seed, epoch, indices, torch.arange(1, count + 1)[:, None])
    return _shift_right(drawn, 40).float() * 2.0**-24


def order_keys(length: int, seed: int, epoch: int) -> Tensor:
    """Return a random int64 for each of 0 ... length - 1. It is draw 0, which `uniforms` does not use."""
    return bits(seed, epoch, torch.arange(length), torch.tensor(0))


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """Return a random permutation of 0 ... length - 1, int64 [length]."""
    return torch.argsort(order_keys(length, seed, epoch), stable=True)
