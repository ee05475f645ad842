"""An argument parser whose complaint is one line, as that of all bad input."""

import argparse
from typing import NoReturn

from str_triton.training.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Raises `UserError` for arguments that do not parse."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")
