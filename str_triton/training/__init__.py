"""The parts that the training programs share: command line, run folder, checkpoints, metrics, progress, report.

Import from the modules (``from str_triton.training.checkpoints import Checkpoints``). All of them need the ``train``
extra (``pip install str-triton[train]``).
"""
