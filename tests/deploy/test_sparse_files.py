"""Compiled networks saved and loaded: the same choices, the same bits, and no file that is none."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from str_triton import deploy
from str_triton.cnn.models import build as build_network
from str_triton.machine import processor
from tests.deploy.sparse_networks import prune
from tests.messages import holding

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class OtherNames(nn.Module):
    """A network with torch's further names of operations, as people write them."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.hstack([x, x.absolute().clip(0, 1)]).divide(2).subtract(0.1)
        x = torch.special.softmax(torch.tensordot(x, x.new_ones(8, 8), 1).swapdims(1, 2), 1).moveaxis(1, 2)
        return self.head(torch.concatenate([x, x.adjoint().mT.negative()], 1)).mean(1)


def test_other_names_of_operations_are_saved(tmp_path: Path, by_kernels):
    model, x = prune(OtherNames(), 0.5), torch.randn(2, 3, 8, 8)
    deploy.compile_sparse(model, x).save(tmp_path / "net")
    torch.testing.assert_close(deploy.load_sparse(tmp_path / "net")(x), model(x).detach())


def test_mutated_records(tmp_path: Path, by_kernels):
    """A record that somebody changed, with the right checksums, is refused in one line, or it runs."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Flatten(1), nn.Linear(36, 4)
    )
    x = torch.randn(2, 3, 12, 12)
    deploy.compile_sparse(prune(model, 0.5), x).save(tmp_path / "net")
    record, tensors = deploy.inspect(tmp_path / "net").metadata["sparse"], deploy.unpack(tmp_path / "net")
    draw, refused = random.Random(0), []
    every = [path for path in paths(record) if path]
    for _ in range(150):
        changed = copy.deepcopy(record)
        *path, last = draw.choice(every)
        place = changed
        for key in path:
            place = place[key]
        place[last] = draw.choice(STRANGE)
        deploy.pack(tensors, tmp_path / "changed", metadata={"sparse": changed}, plain_zeros=True)
        try:
            deploy.load_sparse(tmp_path / "changed")(x)
        except (TypeError, ValueError) as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)


def test_choices_that_do_not_fit_and_strides_beyond_reason(tmp_path: Path, by_kernels):
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)), 0.5)
    x = torch.randn(2, 3, 8, 8)
    deploy.compile_sparse(model, x).save(tmp_path / "net")
    record, tensors = deploy.inspect(tmp_path / "net").metadata["sparse"], deploy.unpack(tmp_path / "net")
    for execution in ("csr", "channels_last"):
        changed = copy.deepcopy(record)
        for choice in changed["choices"].values():
            choice["execution"] = execution
        deploy.pack(tensors, tmp_path / "changed", metadata={"sparse": changed}, plain_zeros=True)
        torch.testing.assert_close(deploy.load_sparse(tmp_path / "changed")(x), model(x).detach())
    (pool,) = (node for node in record["nodes"] if node["kind"] == "MaxPool")
    pool["stride"] = {"tuple": [2**20, 2**20]}
    record["nodes"].remove(next(node for node in record["nodes"] if node["kind"] == "Linear"))
    record["choices"].pop(next(name for name in record["choices"] if name.startswith("linear")))
    record["outputs"] = [{"ref": record["nodes"][-1]["name"]}]
    deploy.pack(tensors, tmp_path / "changed", metadata={"sparse": record}, plain_zeros=True)
    assert deploy.load_sparse(tmp_path / "changed")(x).shape == (2, 8)


def _call(name: str, target: str, inputs: list[str], *args: object) -> dict:
    return {"kind": "Call", "name": name, "inputs": inputs, "variable": False, "label": "", "target": target,
            "args": {"tuple": list(args)}, "kwargs": {"dict": {}}}  # fmt: skip


def test_sizes_that_fill_the_memory_are_refused(tmp_path: Path):
    size = {"ref": "n"}

    def saved(*sizes: object) -> Path:
        nodes = [INPUT, _call("n", "ops.aten.sym_size.int", ["x"], {"ref": "x"}, 0)]
        record = _record([*nodes, _call("z", "ops.aten.zeros.default", ["n"], list(sizes))])
        deploy.pack(
            {"a": torch.zeros(100)}, tmp_path / "net", metadata={"sparse": record | {"outputs": [{"ref": "z"}]}}
        )
        return tmp_path / "net"

    for sizes in ((2**20, 2**20), (2**27, size, size)):
        with pytest.raises(ValueError, match=r"describes no network: z, a tensor .* bytes"):
            deploy.load_sparse(saved(*sizes))
    network = deploy.load_sparse(saved(size, size, size, size, size))
    assert network(torch.ones(2, 3)).shape == (2, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="z, a tensor of"):
        network(torch.ones(256, 3))  # to the power of five


def test_a_padding_that_fills_the_memory_is_left_to_torch(by_kernels):
    layer = nn.Conv2d(2, 3, 3, padding=2**15, dilation=2**15)
    x = torch.randn(1, 2, 8, 8)
    compiled = deploy.compile_sparse(layer, x)
    torch.testing.assert_close(compiled(x), layer(x).detach())
    assert {plan.library for plan in compiled._plans.values()} == {None}


def test_an_input_is_not_changed_into_another_shape(tmp_path: Path):
    record = _record([INPUT, _call("y", "ops.aten.sum.default", ["x"], {"ref": "x"})])
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "net", metadata={"sparse": record})
    assert deploy.load_sparse(tmp_path / "net")(torch.ones(2, 3)).shape == (2, 3)
    deploy.pack(
        {"a": torch.zeros(100)},
        tmp_path / "net",
        metadata={"sparse": record | {"changes": {"dict": {"x": {"ref": "y"}}}}},
    )
    with pytest.raises(ValueError, match="x changes its shape"):
        deploy.load_sparse(tmp_path / "net")


@pytest.mark.parametrize(
    ("target", "args", "name"),
    [
        ("ops.aten._to_copy.default", {"dtype": -1}, "dtype"),
        ("ops.aten.zeros_like.default", {"layout": 7}, "layout"),
        ("ops.aten.zeros_like.default", {"device": 0}, "device"),
        ("ops.aten.clone.default", {"memory_format": 4}, "memory_format"),
        ("ops.aten.cumsum.default", {"dtype": {"ref": "n"}}, "dtype"),
        ("ops.aten.to.dtype", [{"ref": "x"}, 2**40], "dtype"),
        ("ops.aten.scaled_dot_product_attention.default", {"enable_gqa": True}, "enable_gqa"),
    ],
)
def test_arguments_that_torch_does_not_check_are_refused(target: str, args: dict | list, name: str, tmp_path: Path):
    # torch.ops takes a number as the place in a table of its own, and reads beyond its end
    size = _call("n", "ops.aten.sym_size.int", ["x"], {"ref": "x"}, 0)
    first = [{"ref": "x"}] * (3 if "attention" in target else 1) + [0] * ("cumsum" in target)
    call = _call("y", target, ["x"], *(args if isinstance(args, list) else first))
    call["kwargs"] = {"dict": args} if isinstance(args, dict) else call["kwargs"]
    record = _record([INPUT, size, call]) | {"outputs": [{"ref": "y"}]}
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "net", metadata={"sparse": record})
    with pytest.raises(ValueError, match=holding(f"y .. {target} .. {name}")):
        deploy.load_sparse(tmp_path / "net")


STRANGE = [None, True, -1, 0, 2**31, 2**70, 1e308, "", "conv2d", "ops.aten.relu_.default", "ops.aten.from_file.default"]
STRANGE += [[], [[]], {}, {"tuple": []}, {"tuple": [0, 0]}, {"tuple": [10**6, 10**6]}, {"ref": "nothing"}]
STRANGE += [{"tensor": "nothing"}, {"float": "nan"}, {"dtype": "int64"}, {"slice": [0, 1, None]}]


def paths(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the way to every value in a record."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


UNSAFE = [
    ("ops.aten.remainder.int", (1, 0)),
    ("ops.aten.mul.left_t", ([0], 2**40)),
    ("ops.aten.to.prim_dtype", ({"ref": "x"}, -1)),
    ("ops.aten.lstm.input", ({"ref": "x"}, [{"ref": "x"}], [], False, 1, 0.0, False, False, False)),
]
INPUT = {"kind": "Input", "name": "x", "inputs": [], "variable": False}


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
    with pytest.raises(ValueError, match=holding("other .. compile_sparse(...).save")):
        deploy.load_sparse(tmp_path / "other")
    for record, message in (
        ({"format": "str_triton.sparse", "version": 7}, "version 7 of compiled networks, this is for version 3"),
        (_record([{"kind": "Call", "name": "a", "inputs": [], "target": "os.system"}]), "describes no network"),
        *((_record([INPUT, _call("a", name, [], *args)]), f"a calls '{name}'") for name, args in UNSAFE),
        (_record([{"kind": "Norm", "name": "a", "inputs": []}]), "describes no network"),
    ):
        deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": record})
        with pytest.raises(ValueError, match=message):
            deploy.load_sparse(tmp_path / "other")
    endless = _record([INPUT]) | {"choices": {"a": {"execution": "sparse", "width": 0}}}
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": _record([INPUT])})
    assert torch.equal(deploy.load_sparse(tmp_path / "other")(torch.ones(2, 3)), torch.ones(2, 3))
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": endless})
    with pytest.raises(ValueError, match=holding("width=0")):
        deploy.load_sparse(tmp_path / "other")
    deploy.compile_sparse(prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)).save(tmp_path / "net")
    data = bytearray((tmp_path / "net").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        deploy.load_sparse(tmp_path / "net")


def _record(nodes: list) -> dict:
    leaf = {"dtype": {"dtype": "float32"}, "sizes": None, "value": None}
    call = {"tuple": [{"tuple": [0]}, {"dict": {}}]}
    return {
        "format": "str_triton.sparse",
        "version": 2,
        "nodes": nodes,
        "outputs": [{"ref": "x"}],
        "changes": {"dict": {}},
        "signature": {"structure": call, "returns": 0, "leaves": [leaf], "guards": [], "names": []},
        "choices": {},
        "left": {},
        "notes": [],
        "example": [[2, 3]],
        "processor": processor(),
    }
