"""Compiled networks saved and loaded: the same choices, the same bits, and no file that is none."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune

from cnn.models import build as build_network
from str_triton import deploy
from str_triton.deploy.sparse import timing
from tests.deploy.sparse_networks import prune

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    """What is chosen is left to chance here: few timings each."""
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    monkeypatch.setattr(timing, "EVICTED", 1024)


def test_saved_and_loaded(tmp_path: Path, by_kernels):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    compiled = deploy.compile_sparse(model, x)
    compiled.save(tmp_path / "net.str")
    loaded = deploy.load_sparse(tmp_path / "net.str")
    assert torch.equal(loaded(x), compiled(x))
    assert loaded.choices == compiled.choices
    assert str(loaded) == str(compiled)
    assert (tmp_path / "net.str").stat().st_size < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))


def test_files_that_hold_no_network(tmp_path: Path, by_kernels):
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no compiled network: compile_sparse\(...\).save"):
        deploy.load_sparse(tmp_path / "other")
    for record, message in (
        ({"format": "str_triton.sparse", "version": 7}, "version 7 of compiled networks, this is for version 1"),
        (_record([{"kind": "Call", "name": "a", "inputs": [], "target": "os.system"}]), "describes no network"),
        (_record([{"kind": "Norm", "name": "a", "inputs": []}]), "describes no network"),
    ):
        deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": record})
        with pytest.raises(ValueError, match=message):
            deploy.load_sparse(tmp_path / "other")
    endless = _record([]) | {"choices": {"a": {"execution": "sparse", "width": 0}}}
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": endless})
    with pytest.raises(ValueError, match=r"describes no network: .*must be positive integers: .*width=0"):
        deploy.load_sparse(tmp_path / "other")
    deploy.compile_sparse(prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)).save(tmp_path / "net")
    data = bytearray((tmp_path / "net").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        deploy.load_sparse(tmp_path / "net")


def _record(nodes: list) -> dict:
    return {"format": "str_triton.sparse", "version": 1, "nodes": nodes, "output": None, "choices": {}, "left": {}}
