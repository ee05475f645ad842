"""Networks from their weights: of which size they are is seen from the weights alone."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from str_triton.cnn.models import build
from str_triton.cnn.rebuild import rebuild
from str_triton.training.interface import Interface
from tests.messages import holding
from tests.runs import same_bits


@pytest.mark.parametrize("name", ["resnet-digits", "resnet20", "resnet18", "mobilenetv1:0.25"])
@pytest.mark.parametrize(("classes", "channels"), [(7, 1), (64, 3), (1, 64)])
def test_classes_and_channels_are_those_of_the_weights(tmp_path: Path, name: str, classes: int, channels: int):
    model = build(name, num_classes=classes, in_channels=channels)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = rebuild(tmp_path / "weights.pth", name)
    assert (network.name, network.num_classes, network.in_channels) == (name, classes, channels)
    assert network.config is None
    assert not network.model.training
    assert same_bits(dict(network.model.state_dict()), dict(model.state_dict()))


def test_a_file_that_says_its_network_needs_no_name(tmp_path: Path):
    content = {"arch": "resnet20", "state_dict": build("resnet20", num_classes=5).state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    network = rebuild(tmp_path / "checkpoint.pth.tar")
    assert (network.name, network.num_classes) == ("resnet20", 5)
    torch.save(content | {"arch": "vgg16"}, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ValueError, match="give --model"):
        rebuild(tmp_path / "checkpoint.pth.tar")


def test_a_run_says_its_network_and_its_files_do_so_too(whole_run: Path):
    for path in (whole_run, whole_run / "model.safetensors", max((whole_run / "checkpoints").iterdir())):
        network = rebuild(path)
        assert (network.name, network.num_classes, network.in_channels) == ("resnet-digits", 10, 1)
        assert network.config.data == "digits"


def test_the_interface_is_in_the_run_and_in_its_weights(whole_run: Path, tmp_path: Path):
    """One of the two is enough, and two that contradict each other are refused."""
    run, own = shutil.copytree(whole_run, tmp_path / "run"), Interface.read(whole_run / "interface.json")
    other = Interface(own.outputs[::-1], own.standardisation, own.images)
    (run / "interface.json").write_text(other.text())
    for path in (run, run / "model.safetensors"):
        with pytest.raises(ValueError, match=holding(f"{run / 'interface.json'} .. model.safetensors .. remove")):
            rebuild(path)
    (run / "interface.json").unlink()
    assert rebuild(run).interface == own
    (run / "config.json").unlink()
    assert (rebuild(run).interface, rebuild(run).name) == (own, "resnet-digits")
    safetensors.torch.save_file(dict(rebuild(run).model.state_dict()), run / "model.safetensors")
    (run / "interface.json").write_text(other.text())
    assert rebuild(run, "resnet-digits").interface == other
