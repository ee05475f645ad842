"""Costs of a model, budgets as files, and the controller that meets a target."""

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.budget.controller import SparsityController
from str_triton.budget.count import count
from str_triton.budget.rank_budget import MatrixBudget, RankBudget, count_ranks
from str_triton.budget.rank_controller import RankController
from str_triton.budget.rank_target import RankTarget
from str_triton.budget.target import Target

__all__ = [
    "Budget",
    "LayerBudget",
    "MatrixBudget",
    "RankBudget",
    "RankController",
    "RankTarget",
    "SparsityController",
    "Target",
    "count",
    "count_ranks",
]
