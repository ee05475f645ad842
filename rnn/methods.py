"""The methods of rnn/train.py: the model that each begins with, its target and its optimizer."""

import torch
from torch import nn

from str_triton import RankController, RankTarget, parameter_groups
from str_triton.rnn.baselines import equal_ranks, given_ranks
from str_triton.rnn.models import Architecture
from str_triton.rnn.recipes import TARGETED, TARGETS, Config
from str_triton.training.errors import warn

END = 0.3  # fraction of training after which the target holds (docs/learned-rank.md)


def build(config: Config, architecture: Architecture) -> tuple[nn.Module, RankController | None]:
    """Build the model that the method starts with, and the controller of --method str-exact (None otherwise).

    Raises ``ValueError`` for a target that cannot be met.
    """
    if config.method == "str":
        return architecture.build(gradient="masked", raw_threshold_init=config.raw_threshold_init), None
    if config.method not in TARGETED:
        return architecture.build(factorize="none"), None
    random = torch.get_rng_state()
    model = architecture.build()
    if config.ranks is None:
        try:
            controller = RankController(model, rank_target(config), end=END)  # checks the target
        except ValueError as error:
            raise ValueError(f"{target_option(config)}: {error}") from None
        if config.method == "str-exact":
            return model, controller
        ranks = equal_ranks(model, rank_target(config))
        total = sum(ranks.values())
        if config.method == "fixed" and config.target_rank not in (None, total):
            warn(
                f"--target-rank {config.target_rank}: fixed ranks are equal in all matrices, and the total rank is "
                f"{total}; --ranks gives the input and the recurrent matrices different ranks"
            )
    else:
        ranks = given_ranks(model, config.ranks)
    torch.set_rng_state(random)  # the model above only served the checks
    if config.method == "fixed":
        return architecture.build(ranks=ranks), None
    return architecture.build(factorize="none"), None


def rank_target(config: Config) -> RankTarget:
    """Return the target of the configuration."""
    return RankTarget(total_rank=config.target_rank, params=config.target_params, compression=config.target_compression)


def target_option(config: Config) -> str:
    """Return the option of the command line that gives the target."""
    return next(f"--{name.replace('_', '-')}" for name in TARGETS if getattr(config, name) is not None)


def target_text(config: Config) -> str:
    """Return the method and its target in words."""
    target = "none"
    if config.target_rank is not None:
        target = f"total rank {config.target_rank:,}"
    elif config.target_params is not None:
        target = f"{config.target_params:,} parameters"
    elif config.target_compression is not None:
        target = f"{config.target_compression:g} times fewer parameters"
    elif config.ranks is not None:
        target = f"ranks {config.ranks} of the input and recurrent matrices"
    return f"{target} ({config.method})"


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Adam:
    """Return Adam. Weight decay is a part of the gradient, as in the paper's formula."""
    decay = config.spectrum_decay if config.method == "str" else None
    groups = parameter_groups(model, config.weight_decay, decay, spectrum_weight_decay=decay)
    return torch.optim.Adam(groups, lr=config.lr)
