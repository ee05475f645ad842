"""The weights that stay: the shares of the layers, and the largest of each, to the weight."""

import pytest
import torch

from str_triton.cnn.methods.distributions import apportion, erdos_renyi_kernel, uniform
from str_triton.cnn.methods.masks import largest
from str_triton.cnn.models import build


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 6])
def test_largest_is_exact_with_equal_scores(number: int):
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 5.0]])
    order = [5, 1, 2, 3, 0, 4]  # of equal ones the first
    assert largest(scores, number).flatten().nonzero().flatten().tolist() == sorted(order[:number])


def test_largest_agrees_with_a_sort():
    scores = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    for number in (1, 17, 5000, 9999):
        expected = scores.sort(descending=True, stable=True).indices[:number]
        assert torch.equal(largest(scores, number).nonzero().flatten(), expected.sort().values)


def shapes(*sizes: tuple[int, ...]) -> list[torch.Size]:
    return [torch.Size(size) for size in sizes]


def test_erk_by_hand():
    """Sums of dimensions 10, 18, 20; sizes 36, 180, 100; 96 of 316 weights.

    All sparse: scale 96 / 48 = 2, so 20, 36 and 40 weights.
    """
    assert erdos_renyi_kernel(shapes((2, 2, 3, 3), (2, 10, 3, 3), (10, 10)), 96) == [20, 36, 40]


def test_erk_caps_dense_layers_in_turn():
    """Sums 8, 22, 40; sizes 9, 120, 400; 200 weights. Scale 200 / 70: 22.9 > 9, dense; then 191 / 62 = 3.08.

    67.8 of 120 and 123.2 of 400: the weight that rounding leaves goes to the larger remainder.
    """
    assert erdos_renyi_kernel(shapes((1, 1, 3, 3), (10, 12), (20, 20)), 200) == [9, 68, 123]


def test_erk_caps_twice():
    """Sums 8, 10, 100; sizes 9, 25, 2500; 320 weights. First 2.71 * 8 = 21.7 of 9 and 27.1 of 25.

    Only the densest is capped at first (21.7 / 9 > 27.1 / 25); then 311 / 110 = 2.83: 28.3 of 25, capped; 286 are left.
    """
    assert erdos_renyi_kernel(shapes((1, 1, 3, 3), (5, 5), (50, 50)), 320) == [9, 25, 286]


def test_erk_of_resnet50_is_the_published_one():
    """Sparsities in % at 90 % (Kusupati et al., ICML 2020, appendix): the first twelve layers and the last three."""
    with torch.device("meta"):
        weights = [p for p in build("resnet50").parameters() if p.dim() > 1]
    keep = erdos_renyi_kernel([weight.shape for weight in weights], 2_550_291)
    sparsity = [100 - 100 * number / weight.numel() for number, weight in zip(keep, weights, strict=True)]
    published = [58, 0, 82, 4, 4, 4, 82, 4, 4, 82, 4, 43]
    assert sparsity[:12] == pytest.approx(published, abs=0.51)
    assert sparsity[-3:] == pytest.approx([98, 88, 93], abs=0.51)
    assert sum(keep) == 2_550_291


def test_uniform_by_largest_remainders():
    """A tenth of 72, 1152, 64: 7.2, 115.2, 6.4, together 129 of 1288 (128.8 rounded): the remainder .4 is largest."""
    assert uniform(shapes((8, 1, 3, 3), (16, 8, 3, 3), (4, 16)), 129) == [7, 115, 7]


def test_apportion_gives_every_layer_a_weight():
    assert apportion([0.02, 0.03, 9.95], [4, 4, 20], 10) == [1, 1, 8]
    assert apportion([0.1, 0.1, 4.0, 5.8], [9, 9, 9, 9], 10) == [1, 1, 3, 5]  # from those that lost least
    assert sum(apportion([3.0, 3.0], [3, 3], 6)) == 6


@pytest.mark.parametrize("total", [2, 20])
def test_apportion_refuses_what_cannot_be(total: int):
    with pytest.raises(ValueError, match="cannot be met"):
        apportion([1.0, 1.0, 1.0], [4, 4, 4], total)
