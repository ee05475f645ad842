"""Convolutional networks with unstructured sparsity: models, data, recipes and the training program."""

from str_triton.programs import check_started_program

check_started_program()
