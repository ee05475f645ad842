"""The examples run as they stand, are short, and end with what they promise. Each runs in a folder of its own."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from str_triton.nn import thresholded_weights

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str) -> dict[str, Any]:
    """Run an example and return its names. It may not leave accelerate's state behind."""
    try:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_own_loop() -> None:
    budget = run("own_loop.py")["budget"]
    assert budget.nonzeros == round(0.1 * budget.params)
    state = torch.load("digits.pt")
    assert sum(int(value.count_nonzero()) for value in state.values() if value.dim() > 1) == budget.nonzeros


def test_accelerate_loop() -> None:
    names = run("accelerate_loop.py")
    assert names["budget"].nonzeros == round(0.1 * names["budget"].params)
    again = run("accelerate_loop.py")  # There is nothing left to do.
    assert again["first"] == again["epochs"]
    assert all(
        torch.equal(one, two) for one, two in zip(names["model"].parameters(), again["model"].parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore")
def test_mobilenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of the published network for its own pixels, but where zeros pad the images."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    torch.manual_seed(0)
    published = transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(num_labels=1001)).eval()
    for module in published.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.normal_(module.bias, std=0.5)
    published.save_pretrained("published")
    monkeypatch.setattr(sys, "argv", ["", "ours.safetensors", "--source", "published"])
    network, mean, std = map(run("mobilenet_weights.py").get, ("network", "MEAN", "STD"))
    pixels = torch.rand(2, 3, 64, 64) * 255
    ours = network.eval().model[0]((pixels - mean[:, None, None]) / std[:, None, None])
    theirs = published.mobilenet_v1.conv_stem(pixels / 127.5 - 1)
    torch.testing.assert_close(ours[..., :-1, :-1], theirs[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    # With the published first layer all scores are equal: then both networks take the same pixels and zeros.
    layer, norm = map(network.get_submodule, ("model.0.0", "model.0.1"))
    layer.weight.data /= (std / 127.5)[:, None, None]
    norm.running_mean.data = published.mobilenet_v1.conv_stem.normalization.running_mean
    scores = published(pixels / 127.5 - 1).logits
    torch.testing.assert_close(network(pixels / 127.5 - 1), scores[:, 1:], rtol=1e-4, atol=1e-4)
    read = safetensors.torch.load_file("ours.safetensors")
    assert read.keys() == network.state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_hf_trainer() -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    model = run("hf_trainer.py")["again"]
    assert not list(thresholded_weights(model))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(0.8 * sum(weight.numel() for weight in weights))


@pytest.mark.filterwarnings("ignore")
def test_lightning_module() -> None:
    pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")
    budget = run("lightning_module.py")["budget"]
    assert budget.nonzeros == round(0.1 * budget.params)


@pytest.mark.skipif(
    importlib.util.find_spec("timm") is None,
    reason="needs timm, which `make` leaves out: it needs the torchvision of torch's own build",
)
def test_timm_finetune() -> None:
    """Runs in a process of its own: an empty torchvision stands in where there is none."""
    code = (
        "import runpy, sys\nfrom benchmarks.speed import timm_models\n"
        "budget = runpy.run_path(sys.argv[1], run_name='__main__')['budget']\n"
        "assert budget.nonzeros == round(0.1 * budget.params), budget"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(EXAMPLES / "timm_finetune.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr


def test_keyword_spotter() -> None:
    names = run("keyword_spotter.py")
    assert names["correct"] > 0.9
    assert all(Path("build/spotter", file).read_text() for file in ("spotter.h", "spotter.c"))


def notebook_cells(kind: str, notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def notebook() -> dict[str, Any]:
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text())


def test_the_notebook_runs(notebook: dict[str, Any]) -> None:
    """Trains for fewer steps: the budgets are exact after any number of them."""
    changes = 0
    for cell in notebook_cells("code", notebook):
        source, found = re.subn(r"^steps = \d+", "steps = 30", "".join(cell["source"]), flags=re.MULTILINE)
        cell["source"], changes = source.splitlines(keepends=True), changes + found
    assert changes == 1
    names = runpy.run_path(str(ROOT / ".ci" / "run_notebook.py"))["execute"](notebook)
    assert names["budget"].nonzeros == round(0.1 * names["budget"].params)
    assert names["summary"].nbytes == Path("digits.packed.safetensors").stat().st_size < names["summary"].dense_nbytes
    assert names["difference"] < 1e-4
    assert names["ranks"].compression >= 4


def test_the_notebook_has_its_outputs(notebook: dict[str, Any]) -> None:
    cells = notebook_cells("code", notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    text = "".join(line for output in outputs for line in output.get("text", []))
    assert all(cell["outputs"] for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not re.search(r"(^|\s)[/~]\w|[A-Z]:\\|\bm?s\b|second", text), "a path of one machine, or a time"
