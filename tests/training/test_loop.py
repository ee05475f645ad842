import torch

from str_triton.training.loop import split


def test_split_gives_equal_parts_in_order():
    images, labels = torch.arange(24).view(6, 4), torch.arange(6)
    assert split((images, labels), 1)[0][0] is images
    parts = split((images, None, labels), 3)
    assert [(part[0].tolist(), part[1], part[2].tolist()) for part in parts] == [
        (images[2 * k : 2 * k + 2].tolist(), None, [2 * k, 2 * k + 1]) for k in range(3)
    ]
