"""Learning rates as pure functions of training's progress, and what they do to a threshold that only decays."""

import math
from collections.abc import Iterable, Iterator


def warmup_cosine(progress: float, warmup: float) -> float:
    """The share of the peak learning rate at ``progress`` (0..1): a linear rise over ``warmup``, then half a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-12, 1.0 - warmup))))


def decayed_thresholds(start: float, rates: Iterable[float], weight_decay: float, momentum: float) -> Iterator[float]:
    """Where SGD's weight decay alone takes a raw threshold that starts at ``start``: its value after each step.

    While sigmoid(s) and its gradient are 0 in float32, decay is all that moves s: with momentum m the buffer follows
    v <- m v + lambda s and s <- s - lr v, which shrinks s by the factor prod(1 - lr lambda / (1 - m)) to first order.
    """
    value, buffer = start, 0.0
    for rate in rates:
        buffer = momentum * buffer + weight_decay * value
        value -= rate * buffer
        yield value
