"""The learning rate of each step, and a prediction of when --method str begins to prune."""

from str_triton.cnn.config import Config
from str_triton.training.errors import tell, warn
from str_triton.training.schedules import decayed_thresholds, warmup_cosine

EFFECTIVE = -10.0  # above this raw threshold the threshold is 5e-5 or more, and its gradient moves it as well


def learning_rate(config: Config, steps: int, step: int) -> float:
    """Return the learning rate of step number ``step``, counted from 0: the schedule at the middle of the step.

    The paper's schedule, epoch-cosine, is constant within an epoch. During warmup it takes the schedule's value at the
    epoch's end, later the value at the epoch's beginning.
    """
    progress = (step + 0.5) / (config.epochs * steps)
    if config.lr_schedule == "epoch-cosine":
        epoch = step // steps
        progress = (epoch + 1 if epoch < config.warmup_epochs else epoch) / config.epochs
    return config.lr * warmup_cosine(progress, config.warmup_epochs / config.epochs)


def pruning_start(config: Config, steps: int) -> tuple[int | None, float]:
    """Predict the epoch in which pruning starts. Until then only weight decay moves a very negative raw threshold.

    Returns:
        The epoch, counted from 1, or None if pruning does not start; and the raw threshold then, or at the end.
    """
    rates = (learning_rate(config, steps, step) for step in range(config.epochs * steps))
    start = end = config.raw_threshold_init
    for step, end in enumerate(decayed_thresholds(start, rates, config.weight_decay, config.momentum)):
        if end > EFFECTIVE:
            return step // steps + 1, end
    return None, end


def announce_pruning(config: Config, steps: int) -> None:
    """Print in which epoch pruning will start, or warn that it will not."""
    epoch, end = pruning_start(config, steps)
    if epoch is None:
        warn(
            f"nothing will be pruned: weight decay moves the raw thresholds from {config.raw_threshold_init:g} to "
            f"{end:.4g} in {config.epochs} epochs, and pruning starts above {EFFECTIVE:g}; "
            "train longer, or raise --weight-decay or --raw-threshold-init"
        )
    elif config.raw_threshold_init < EFFECTIVE:
        tell(
            f"pruning will start in epoch {epoch} of {config.epochs}, when weight decay has moved the raw thresholds "
            f"from {config.raw_threshold_init:g} to {EFFECTIVE:g}"
        )
