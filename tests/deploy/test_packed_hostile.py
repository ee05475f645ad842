"""Packed files from people who mean harm: checksums are right, the content is wrong.

Each is refused in one line, or read rightly.
"""

import copy
import hashlib
import json
import random
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from str_triton import Budget, LowRankLinear, deploy
from str_triton.__main__ import main
from str_triton.budget.budget import LayerBudget
from str_triton.deploy import content as content_module
from tests.deploy.packing import content_of, header_of, holed, same_bits, sealed, with_content
from tests.messages import holds

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\n"
# What a mutation puts in the place of a value.
VALUES = (
    *(None, True, -1, 0, 1, 3, 62, 63, 10**9, 2**31, 2**62, 2**63, 2**64, 10**400, 0.5, -1e300, "", "40", "a", "F16"),
    *("BOOL", "I64", "F99", ESCAPES, [], [0], [3], [-1], [2**20, 2**20], [2**62, 2**62], [2**62, 0], [1] * 70),
    *({}, {"same_as": "gaps"}, {"same_as": "shared"}, {"same_as": "none"}, [["gaps", "gaps"]], ["gaps", "dense"]),
)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gaps = torch.nn.Parameter(holed(40, 50))
        self.mask = torch.nn.Parameter(holed(20, 50, sparsity=0.5))
        self.dense = torch.nn.Parameter(torch.randn(7, 3))
        self.signs = torch.nn.Parameter(-holed(40, 30).abs())
        self.shared = self.gaps
        self.linear = LowRankLinear(30, 20, max_rank=3)
        self.register_buffer("truth", holed(300) != 0)
        self.register_buffer("empty", torch.zeros(0, 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "x"
    budget = Budget([LayerBudget("gaps", 2000, 200, 2000, 200, 0.1), LayerBudget("dense", 21, 21, 0, 0, covered=False)])
    deploy.pack(Model(), path, "float16", budget=budget, metadata={"note": ["all", 1.5]})
    return path.read_bytes()


def refused(path: Path, file: bytes) -> list[str]:
    """Why the readers refuse the file; each that does says so in one line that begins with its path."""
    path.write_bytes(file)
    messages = []
    for reader in (deploy.inspect, deploy.unpack, lambda path: deploy.unpack(path, factors=True)):
        try:
            str(reader(path))
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert message.isprintable()
            assert len(message) < len(str(path)) + 300
            messages.append(message.removeprefix(f"{path}: "))
    return messages


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The place of every value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, child in inner for place in places(child, (*path, key)))]


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced, left out, added, or put under another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *way, last = rng.choice(places(value))
        parent = value
        for key in way:
            parent = parent[key]
        kind = rng.randrange(6)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("gaps", "none", "low_bits", "same_as", "gaps|values", ESCAPES))] = parent.pop(last)
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice(("other", "low_bits", "same_as", "covered"))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(parent[last], int):
            parent[last] += rng.choice((-1, 1, 8))
        else:
            parent[last] = copy.deepcopy(rng.choice(VALUES))
        if not places(value):
            break
    return value


@pytest.mark.parametrize("seed", range(60))
def test_mutated_headers_are_refused_or_read(tmp_path: Path, whole: bytes, seed: int):
    """600 of them. What is still accepted gives tensors that agree with their description."""
    rng = random.Random(seed)
    start, header = header_of(whole)
    content = json.loads(header["__metadata__"].pop("content"))
    tracemalloc.start()
    for _ in range(10):
        arrays, described = (mutated(header, rng), content) if rng.random() < 0.4 else (header, mutated(content, rng))
        metadata = arrays.get("__metadata__")
        if not isinstance(metadata, dict):
            continue
        made = arrays | {"__metadata__": {**metadata, "content": json.dumps(described)}}
        if not refused(tmp_path / "x", sealed(made, whole[start:])):
            summary, state = deploy.inspect(tmp_path / "x"), deploy.unpack(tmp_path / "x", factors=True)
            assert [tensor.name for tensor in summary.tensors] == list(state)
            for tensor in summary.tensors:
                assert (tensor.shape, f"torch.{tensor.dtype}") == (
                    tuple(state[tensor.name].shape),
                    str(state[tensor.name].dtype),
                )
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_the_file_itself_is_read(tmp_path: Path, whole: bytes):
    assert not refused(tmp_path / "x", whole)
    assert not refused(tmp_path / "x", with_content(whole, content_of(whole)))


def change(**entry: Any) -> Callable[[dict], object]:
    return lambda content: content["tensors"]["gaps"].update(entry)


def budget(**record: Any) -> Callable[[dict], object]:
    return lambda content: content.update(budget=record)


ROW = {"name": "a", "params": 6, "nonzeros": 3, "dense_flops": 0, "flops": 0, "threshold": 0.5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (change(shape=[2**20, 2**20]), "would take 4,398"),
        (change(shape=[2**40, 2**40]), "more elements"),
        (change(shape=[2**62] * 100_000), "more elements"),
        (change(shape=[2**32, 2**32, 0]), "more elements"),
        (change(shape=[-40, -50]), r"tensors\['gaps'\].shape\[0\].*whole number"),
        (change(shape=[3]), "values .* 3 elements"),
        (change(shape=["40", 50]), r"shape\[0\].*whole number"),
        (change(shape="40"), "shape: expected a list"),
        (change(low_bits=10**9), "low_bits.* 1000000000"),
        (change(low_bits=-1), "low_bits: expected"),
        (change(low_bits=9), "positions"),
        (change(low_bits=None), "is dense.* arrays"),
        (change(dtype="F99"), "dtype: expected one of"),
        (change(dtype="I32"), "I32.* F16"),
        (change(nonzeros=2001), "2001 of"),
        (change(nonzeros=-1), "nonzeros: expected"),
        (change(sha256=7), "sha256: expected a text"),
        (change(more=1), "'more' is unknown"),
        (change(same_as="dense"), "'same_as' is unknown"),
        (lambda content: content["tensors"].update(dense={"same_as": "dense"}), "not stored before it"),
        (lambda content: content["tensors"].update(a={"same_as": "b"}, b={"same_as": "a"}), "not stored before it"),
        (lambda content: content["tensors"].update(a={"same_as": "none"}), "not stored before it"),
        (lambda content: content["tensors"].update(a={"same_as": "shared"}), "not stored before it"),
        (lambda content: content["tensors"].update(a=content["tensors"]["gaps"]), "is sparse.* arrays"),
        (lambda content: content["tensors"].pop("dense"), "'dense' .*no tensor"),
        (lambda content: content.pop("tensors"), "'tensors' is missing"),
        (lambda content: content.clear(), "'values' is missing"),
        (lambda content: content.update(more=1), "'more' is unknown"),
        (lambda content: content.update(values="float64"), "values.*float32, float16, bfloat16"),
        (lambda content: content.update(values="float32"), "F16.* float32"),
        (lambda content: content.update(metadata=[1]), "metadata: expected an object"),
        (lambda content: content.update(products={"p": ["none", "dense"]}), "its factor 'none' is"),
        (lambda content: content.update(products={"p": ["dense", "dense"]}), "its factor 'dense' is"),
        (lambda content: content.update(products={"dense": ["gaps", "mask"]}), "product 'dense' is also"),
        (lambda content: content.update(products={"p": ["gaps", "dense"]}), "factors of shapes"),
        (lambda content: content.update(products={"p": ["truth", "dense"]}), "factors of shapes"),
        (lambda content: content.update(products={"p": ["gaps"]}), "a list of 2"),
        (lambda content: content.update(products=[]), "products: expected an object"),
        (budget(), "budget.kind.*Budget, RankBudget"),
        (budget(kind="dict", rows=[]), "budget.kind"),
        (budget(kind="Budget"), "'rows' is missing"),
        (budget(kind="Budget", rows=[{}]), r"rows\[0\]: 'name' is missing"),
        (budget(kind="Budget", rows=[ROW | {"params": "6"}]), r"rows\[0\].params"),
        (budget(kind="Budget", rows=[ROW | {"nonzeros": 7}]), "nonzeros.* 7.* params.* 6"),
        (budget(kind="Budget", rows=[ROW | {"threshold": "x"}]), r"threshold: expected a number"),
        (budget(kind="RankBudget", rows=[ROW]), r"rows\[0\]: 'rows' is missing"),
        (lambda content: content.update(budget=[]), "budget: expected an object"),
    ],
)  # fmt: skip
def test_wrong_content_is_named(tmp_path: Path, whole: bytes, make: Callable[[dict], object], message: str):
    content = content_of(whole)
    make(content)
    first, *others = refused(tmp_path / "x", with_content(whole, content))
    assert re.search(message, first), first
    assert others == [first] * 2  # every reader refuses it, and for the same reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("", "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
        ('{"metadata": {"x": %s}}' % ("[" * 500 + "]" * 500), "nested deeper"),
        ('{"tensors": {}, "tensors": {}}', "'tensors' occurs twice"),
        ('{"metadata": {"x": NaN}}', "NaN"),
        (r'{"metadata": {"\ud800": 1}}', "not Unicode"),
    ],
)
def test_content_that_is_no_json_is_refused(tmp_path: Path, whole: bytes, text: str, message: str):
    messages = refused(tmp_path / "x", with_content(whole, text))
    assert len(messages) == 3
    assert message in messages[0]


def test_a_key_that_is_twice_in_the_header_is_refused(tmp_path: Path, whole: bytes):
    start, header = header_of(whole)
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header)
    entry = json.dumps({"dense": header["dense"]})[1:-1]
    (message, *_) = refused(tmp_path / "x", sealed(text.replace(entry, f"{entry}, {entry}"), whole[start:]))
    assert "'dense' occurs twice" in message


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("dense", {"shape": [3, 7]}, "[7, 3] .. [3, 7]"),
        ("dense", {"shape": [7]}, "bytes"),
        ("dense", {"data_offsets": [0, 42]}, "bytes"),
        ("dense", {"data_offsets": [10**18, 10**18 + 42]}, "bytes"),
        ("dense", {"data_offsets": [42, 0]}, "bytes"),
        ("dense", {"data_offsets": [0]}, "a list of 2"),
        ("gaps|positions", {"dtype": "I8"}, "U8"),
        ("stray", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "'stray' .. no tensor"),
        ("dense|signs", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "is dense .. arrays"),
        ("gaps", {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}, "is sparse .. arrays"),
    ],
)
def test_a_wrong_array_is_named(tmp_path: Path, whole: bytes, name: str, entry: dict, message: str):
    start, header = header_of(whole)
    header[name] = header.get(name, {}) | entry
    first, *others = refused(tmp_path / "x", sealed(header, whole[start:]))
    assert holds(first, message)
    assert others == [first] * 2


def test_a_matrix_whose_product_fills_the_memory_is_refused(tmp_path: Path):
    """Two megabytes of factors, and 256 GB of product."""
    deploy.pack({"u": torch.ones(2**18, 1), "v": torch.ones(2**18, 1)}, tmp_path / "x", plain_zeros=True)
    file = (tmp_path / "x").read_bytes()
    content = content_of(file) | {"products": {"p": ["u", "v"]}}
    assert "would take 274," in refused(tmp_path / "x", with_content(file, content))[0]


def make_deep() -> list:
    deep: list = []
    for _ in range(200):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"w": torch.zeros(10**6)}, {}, "4,000,000 bytes"),
        ({"\ud800": torch.zeros(3)}, {}, "not Unicode"),
        ({"w": torch.zeros(3)}, {"budget": Budget([LayerBudget("w", 3, -1, 0, 0)])}, r"rows\[0\].nonzeros: expected"),
        ({"w": torch.zeros(3)}, {"budget": Budget([LayerBudget("w", 3, 4, 0, 0)])}, "nonzeros.* 4.* params.* 3"),
        ({"w": torch.zeros(3)}, {"metadata": {"deep": make_deep()}}, "nested deeper"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict, options: dict, message: str
):
    monkeypatch.setattr(content_module, "FREE_NBYTES", 10**6)
    with pytest.raises((ValueError, TypeError), match=message):
        deploy.pack(state, tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_positions_and_truth_values_that_are_none_are_named(tmp_path: Path):
    """The checksums of the data are right as well; the readers that read the data refuse them."""
    truth = torch.ones(200, dtype=torch.bool)
    file = pack_changed(tmp_path / "x", {"b": truth}, lambda data: data.__setitem__(7, 2))
    first, *others = refused(tmp_path / "x", file)
    assert holds(first, "'b' .. byte of 2")
    assert others == [first]
    sparse = torch.zeros(4000)
    sparse[::100] = 1.5
    file = pack_changed(tmp_path / "x", {"b": sparse}, lambda data: data.__setitem__(slice(-3, None), b"\0\0\0"))
    first, *others = refused(tmp_path / "x", file)
    assert holds(first, "'b' .. positions of 40 values")
    assert others == [first]


def pack_changed(path: Path, state: dict[str, torch.Tensor], spoil: Callable[[bytearray], object]) -> bytes:
    """A file of one tensor whose data are changed and have the right checksum again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deploy.pack(state, path)
    file = path.read_bytes()
    start, content = header_of(file)[0], content_of(file)
    data = bytearray(file[start:])
    spoil(data)
    (entry,) = content["tensors"].values()
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    return with_content(file[:start] + bytes(data), content)


def test_names_cannot_act_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture, whole: bytes):
    content = content_of(whole)
    content["tensors"][ESCAPES] = {"same_as": "gaps"}
    content["metadata"] = {ESCAPES: ESCAPES}
    content["budget"]["rows"][0]["name"] = ESCAPES
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_content(whole, content))
    assert main(["inspect", str(path)]) == 0
    content["tensors"][ESCAPES] = {"same_as": ESCAPES}
    other = tmp_path / "y\x1b[2J.safetensors"
    other.write_bytes(with_content(whole, content))
    assert main(["inspect", str(other)]) == 2
    assert main(["unpack", str(path), "--to", str(tmp_path / "z\x1b[2J.pt")]) == 0
    card = deploy.model_card(path, title="t", description="d").read_text()
    out, err = capsys.readouterr()
    for text in (out, err, card):
        assert r"\x1b[2J" in text
        assert all(line.isprintable() for line in text.split("\n"))
    assert len(err.splitlines()) == 1
    assert ESCAPES in deploy.inspect(path).tensors[-1].name  # the name itself is as it was
    assert same_bits({"a": deploy.unpack(path)[ESCAPES]}, {"a": deploy.unpack(path)["gaps"]})
