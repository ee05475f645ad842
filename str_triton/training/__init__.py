"""Run plumbing shared by the training programs: command line, run folder, checkpoints, metrics, progress, report.

Import from the files themselves (``from str_triton.training.checkpoints import Checkpoints``): each holds one idea, and
all of them need the ``train`` extra (``pip install str-triton[train]``).
"""
