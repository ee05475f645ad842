from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

from str_triton.training.config import TrainConfig, check_parts, make_accelerator
from str_triton.training.errors import UserError
from tests.messages import holding


@pytest.fixture
def fresh_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_own_accumulation_does_not_scale_the_loss(fresh_state: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(TrainConfig(recipe="", device="cpu")).gradient_accumulation_steps == 1


def test_a_batch_has_equal_parts():
    config = TrainConfig(recipe="", batch_size=24, accumulate=3)
    check_parts(config, 4)
    with pytest.raises(UserError, match=holding("--batch-size 24 .. 5 processes .. --accumulate 3 .. 15 .. 30")):
        check_parts(config, 5)
