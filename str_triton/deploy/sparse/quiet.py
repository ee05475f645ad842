"""Silence for what torch says while this package tries something that may fail."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

# They print tracebacks and graphs of what is caught here.
_LOGGERS = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from warning, logging and printing."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
