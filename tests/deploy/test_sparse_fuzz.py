"""Random networks against eager PyTorch in float64; benchmarks/studies/sparse_fuzz.py has the long run."""

import pytest

from benchmarks.studies import sparse_fuzz

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


@pytest.mark.parametrize("seed", [5, 57, 10046, 1_000_001])
def test_random_networks(seed: int):
    assert sparse_fuzz.check(seed) is None
