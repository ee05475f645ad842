"""Export of recurrent classifiers to C99 for microcontrollers."""

from str_triton.deploy.c_export.export import export_c
from str_triton.deploy.c_export.program import Sizes
from str_triton.deploy.c_export.spotter import KeywordSpotter, SpotterSizes

__all__ = ["KeywordSpotter", "Sizes", "SpotterSizes", "export_c"]
