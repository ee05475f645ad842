"""From a module to a graph of plain data: torch.export, then lowering to the few kinds of node of this package."""
