import pytest
import torch

from str_triton.training.errors import UserError
from str_triton.training.loop import require_same_shapes, split


def test_split_gives_equal_parts_in_order():
    images, labels = torch.arange(24).view(6, 4), torch.arange(6)
    assert split((images, labels), 1)[0][0] is images
    parts = split((images, None, labels), 3)
    assert [(part[0].tolist(), part[1], part[2].tolist()) for part in parts] == [
        (images[2 * k : 2 * k + 2].tolist(), None, [2 * k, 2 * k + 1]) for k in range(3)
    ]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"weight": (3, 2), "bias": (3,)}, r"weight .*\[3, 2\] in it, \[2, 2\] here"),
        ({"weight": (2, 2)}, r"bias .*not there in it, \[2\] here"),
        ({"weight": (2, 2), "bias": (2,), "more": ()}, r"more .*\[\] in it, not there here"),
    ],
)
def test_the_first_tensor_of_another_network_is_named(saved: dict[str, tuple[int, ...]], message: str):
    own = torch.nn.Linear(2, 2).state_dict()
    require_same_shapes(own, own)
    with pytest.raises(UserError, match=message):
        require_same_shapes(own, {key: torch.zeros(shape) for key, shape in saved.items()})
