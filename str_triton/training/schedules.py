"""Learning rate schedules as functions of progress, and the raw threshold under weight decay alone."""

import math
from collections.abc import Iterable, Iterator


def warmup_cosine(progress: float, warmup: float) -> float:
    """Return the learning rate at ``progress`` (0..1) as a share of its peak: linear over ``warmup``, then a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-12, 1.0 - warmup))))


def decayed_thresholds(start: float, rates: Iterable[float], weight_decay: float, momentum: float) -> Iterator[float]:
    """Yield the raw threshold after each step of SGD with weight decay alone, beginning at ``start``.

    While sigmoid(s) and its gradient are 0 in float32, only weight decay changes s. With momentum m the update is
    v <- m v + lambda s, s <- s - lr v. To first order this multiplies s by prod(1 - lr lambda / (1 - m)).
    """
    value, buffer = start, 0.0
    for rate in rates:
        buffer = momentum * buffer + weight_decay * value
        value -= rate * buffer
        yield value
