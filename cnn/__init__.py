"""Convolutional networks with unstructured sparsity: models, data, recipes and the training program."""
