import pytest
import torch

from cnn.models import MODELS, build


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3), (33, 1)])
def test_scores_for_images_of_any_size(name: str, size: int, channels: int):
    model = build(name, num_classes=7, in_channels=channels)
    scores = model(torch.randn(2, channels, size, size))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "weights"), [("resnet-digits", 76_704), ("resnet-small", 307_744)])
def test_number_of_weights(name: str, weights: int):
    model = build(name, num_classes=10, in_channels=1)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1) == weights


def test_the_seed_decides_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build("resnet-digits", num_classes=10, in_channels=1).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_an_unknown_name_lists_the_models():
    with pytest.raises(ValueError, match=r"no model 'vgg'; the models are resnet-digits, resnet-small"):
        build("vgg", num_classes=10, in_channels=1)
