"""Export of recurrent classifiers to C99 for microcontrollers."""

from str_triton.rnn.c_export.program import WEIGHTS, Sizes, write_c

__all__ = ["WEIGHTS", "Sizes", "write_c"]
