"""Networks from their weights: of which size they are is seen from the weights alone."""

from pathlib import Path

import pytest
import torch

from str_triton.cnn.models import build
from str_triton.cnn.rebuild import rebuild
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
