"""python -m str_triton pack|unpack|inspect: files in and out, what it says, and bad input in one line."""

import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from str_triton import LowRankLinear, __main__, __version__, count_ranks, deploy
from tests.deploy.packing import holed, same_bits
from tests.messages import holds


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"weight": holed(40, 50), "bias": torch.randn(40)}


def run(*args: object) -> int:
    """The exit code, as from a process of its own."""
    try:
        return __main__.main([str(arg) for arg in args])
    except SystemExit as leaving:
        return leaving.code


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
def test_there_and_back(tmp_path: Path, state: dict[str, Tensor], wrap, capsys: pytest.CaptureFixture):
    torch.save(wrap(state), tmp_path / "net.pt")
    packed = tmp_path / "net.packed.safetensors"
    assert run("pack", tmp_path / "net.pt") == 0
    size = packed.stat().st_size
    assert capsys.readouterr().out == f"wrote {packed}\n{size / 1e3:.1f} kB instead of 8.2 kB, {size / 81.6:.1f} %.\n"
    assert same_bits(deploy.unpack(packed), state)
    assert run("unpack", packed) == 0
    plain = tmp_path / "net.unpacked.safetensors"
    assert capsys.readouterr().out == f"wrote {plain}: 2 plain tensors\n"
    assert same_bits(dict(sorted(safetensors.torch.load_file(plain).items())), dict(sorted(state.items())))
    assert run("inspect", packed) == 0
    assert capsys.readouterr().out == f"{deploy.inspect(packed)}\n"
    assert sorted(os.listdir(tmp_path)) == ["net.packed.safetensors", "net.pt", "net.unpacked.safetensors"]


def test_a_file_that_exists_is_overwritten_only_by_name(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture
):
    torch.save(state, tmp_path / "net.pt")
    exported = tmp_path / "net.packed.safetensors"
    exported.write_bytes(b"such as an exported network")
    assert run("pack", tmp_path / "net.pt") == 2
    assert holds(capsys.readouterr().err, f"error: {exported} .. exists .. --to")
    assert exported.read_bytes() == b"such as an exported network"
    assert run("pack", tmp_path / "net.pt", "--to", exported) == 0
    assert same_bits(deploy.unpack(exported), state)


def test_options(tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture):
    state["weight"][state["weight"] == 0] *= -1
    state["same"] = state["weight"]
    safetensors.torch.save_file({"weight": state["weight"]}, tmp_path / "a.safetensors")
    assert run("pack", tmp_path / "a.safetensors", "--to", tmp_path / "b", "--values", "float16", "--plain-zeros") == 0
    assert "float16" in capsys.readouterr().out
    half = deploy.unpack(tmp_path / "b")["weight"]
    assert torch.equal(half, state["weight"].half().float())
    assert not half.signbit()[half == 0].any()
    deploy.pack(state, tmp_path / "c")
    assert run("unpack", tmp_path / "c", "--to", tmp_path / "c.pt") == 0
    loaded = torch.load(tmp_path / "c.pt")
    assert same_bits(loaded, state)
    assert loaded["weight"].data_ptr() == loaded["same"].data_ptr()
    assert run("unpack", tmp_path / "c", "--to", tmp_path / "c.safetensors") == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "c.safetensors")["same"], state["weight"])


def test_factors_and_budget(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = LowRankLinear(40, 50, max_rank=2)
    deploy.pack(model, tmp_path / "x", metadata={"run": "r1"})
    assert run("inspect", tmp_path / "x") == 0
    out = capsys.readouterr().out
    assert f"\n\nbudget:\n{count_ranks(model)}\n" in out
    assert '"run": "r1"' in out
    for options, names in ([], {"bias", "weight"}), (["--factors"], {"bias", "weight.u", "weight.v"}):
        assert run("unpack", tmp_path / "x", "--to", tmp_path / "x.unpacked.safetensors", *options) == 0
        assert set(safetensors.torch.load_file(tmp_path / "x.unpacked.safetensors")) == names


def test_a_model_without_zeros_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({"weight": torch.randn(30, 30)}, tmp_path / "a.pt")
    assert run("pack", tmp_path / "a.pt") == 0
    out, err = capsys.readouterr()
    assert "all are stored dense" in out
    assert err == ""


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "command .. python -m str_triton --help"),
        (["shrink", "a.pt"], "no command shrink"),
        (["pack"], "missing: FILE .. python -m str_triton pack --help"),
        (["pack", "a.pt", "--values", "int8"], "--values int8 .. float32"),
        (["pack", "a.pt", "--factors"], "no option --factors"),
        (["pack", "none"], "none: No such file"),
        (["pack", "."], ".: Is a directory"),
        (["pack", "text"], "text: .. weights"),
        (["pack", "harm.pt"], "harm.pt: .. state dict"),
        (["pack", "list.pt"], "list.pt: .. state dict .. got list"),
        (["pack", "mixed.pt"], "mixed.pt: .. 'epoch' is int"),
        (["pack", "thresholds.pt"], "thresholds.pt: .. 'raw_threshold' .. which g"),
        (["pack", "packed"], "packed: .. already packed"),
        (["pack", "a.pt", "--to", "a.pt"], "a.pt .. input .. --to"),
        (["pack", "a.pt", "--to", "none/b"], "none/b: No such file"),
        (["pack", "large.pt", "--values", "float16"], "'a' .. 1e+10 .. float16 .. 65504"),
        (["unpack", "a.pt"], "a.pt: .. not a packed file .. python -m str_triton pack"),
        (["unpack", "packed", "--to", "b.bin"], "b.bin: .. .safetensors, .pt, .pth"),
        (["inspect", "cut"], "cut: .. 'a' .. cut off"),
        (["inspect", "none"], "none: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, args: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    files = {
        "a.pt": {"a": holed(20, 50)},
        "harm.pt": Harm(),
        "list.pt": [torch.ones(2)],
        "mixed.pt": {"a": torch.ones(2), "epoch": 3},
        "thresholds.pt": {"weight": torch.ones(2, 2), "raw_threshold": torch.ones(1)},
        "large.pt": {"a": torch.full((2, 2), 1e10)},
    }
    for name, content in files.items():
        torch.save(content, name)
    Path("text").write_text("no tensors")
    deploy.pack(files["a.pt"], "packed")
    Path("cut").write_bytes(Path("packed").read_bytes()[:-1])
    before = sorted(os.listdir())
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert holds(err, message)
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert run("pack", "--help") == 0
    assert capsys.readouterr().out == text
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    source = Path(__main__.__file__).read_text()
    options = re.findall(r'add_argument\("(--[\w-]+)"', source)
    assert sorted(options) == ["--factors", "--plain-zeros", "--to", "--values"]
    for word in (*options, "pack FILE", "unpack FILE", "inspect FILE", "train-cnn", "export TARGET", *__main__.VALUES):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_help_of_export_names_the_targets_of_both_kinds_of_networks(capsys: pytest.CaptureFixture):
    assert run("export", "--help") == 0
    text = capsys.readouterr().out
    assert {"pack", "onnx", "sparse", "c"} <= set(text.split())
    assert run("export", "onnx", "--help") == 0
    text = capsys.readouterr().out
    assert "--image-size" in text  # of convolutional networks
    assert "--streaming" in text  # of recurrent ones
    assert run("export", "c", "--help") == 0
    assert "--weights" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 100])
def test_help_wraps_at_the_width_of_the_terminal(
    columns: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run("--help") == 0
    wrapped = capsys.readouterr().out
    assert columns - 20 < max(map(len, wrapped.splitlines())) <= columns
    monkeypatch.setenv("COLUMNS", "1000")
    assert run("--help") == 0
    assert capsys.readouterr().out.split() == wrapped.split()


def test_metadata_that_fills_pages_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "x", metadata={"graph": list(range(2000)), "run": 7})
    assert run("inspect", tmp_path / "x") == 0
    printed = capsys.readouterr().out
    assert '"graph": "(10,890 characters)"' in printed
    assert '"run": 7' in printed
