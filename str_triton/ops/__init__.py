"""The PyTorch side of each kernel file, under the same file names."""
