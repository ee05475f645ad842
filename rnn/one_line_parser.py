"""An argument parser that reports errors in one line."""

import argparse
from typing import NoReturn

from str_triton.training.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")
