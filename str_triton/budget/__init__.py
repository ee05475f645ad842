"""What a model costs, budgets as files, and the controller that meets a target."""

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.budget.controller import SparsityController
from str_triton.budget.count import count
from str_triton.budget.target import Target

__all__ = ["Budget", "LayerBudget", "SparsityController", "Target", "count"]
