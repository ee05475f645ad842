"""What a model costs, budgets as files, and the controller that meets a target."""

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.budget.controller import SparsityController, Target
from str_triton.budget.count import count

__all__ = ["Budget", "LayerBudget", "SparsityController", "Target", "count"]
