"""A user's program for `make types`: a type checker reports an error on each line marked "wrong", and on no other."""

import torch
from torch import Tensor, nn

from str_triton import (
    LowRankGRU,
    LowRankLinear,
    RankController,
    RankTarget,
    SparsityController,
    Target,
    count,
    deploy,
    low_rank_gru,
    parameter_groups,
    soft_threshold,
    sparsify,
)

model = sparsify(nn.Sequential(nn.Linear(4, 2)), granularity="filter", exclude="head*")
controller = SparsityController(model, Target(sparsity=0.9), schedule="cubic")
controller.step(0.5)
with controller.exact():
    nonzeros: int = count(model, torch.ones(1, 4)).nonzeros
weight: Tensor = soft_threshold(torch.ones(3), torch.zeros(1), g="exp")
layer: LowRankGRU = LowRankGRU.from_dense(nn.GRU(4, 8), max_rank=2, factorize="recurrent")
RankController(layer, RankTarget(total_rank=4))
deploy.pack(layer.compact(), "layer.str")

sparsify(model, granularity=3)  # wrong
sparsify(model, granularty="filter")  # wrong
SparsityController(model, 0.9)  # wrong
SparsityController(model, RankTarget(total_rank=4))  # wrong
controller.step("0.5")  # wrong
soft_threshold(torch.ones(3), 0.1)  # wrong
low_rank_gru(weight, weight, weight, weight, None)  # wrong
LowRankGRU(4, "8")  # wrong
LowRankGRU.from_dense(nn.GRU(4, 8), max_rank="2")  # wrong
LowRankLinear(4, 2, raw_threshold="-10")  # wrong
parameter_groups(model, weight_decay=None)  # wrong
Target(sparcity=0.9)  # wrong
Target(sparsity="90 %")  # wrong
RankTarget(layers={})  # wrong
threshold: str = count(model, torch.ones(1, 4)).sparsity  # wrong
deploy.pack(3, "layer.str")  # wrong
