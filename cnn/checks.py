"""Checks of a run's options, files and images before anything is written."""

from pathlib import Path

from torch import Tensor, nn

from str_triton.cnn.config import Config
from str_triton.cnn.methods.budget_file import named_sparsities
from str_triton.cnn.models import single_value_norms, state_shapes
from str_triton.cnn.pretrained import check_start
from str_triton.cnn.recipes import FINETUNING
from str_triton.cnn.weights import read_weights
from str_triton.training.checkpoints import Checkpoints
from str_triton.training.errors import UserError, one_line


def check_inputs(config: Config) -> None:
    """Check all files and names that a run needs, except its images, whose reading takes longer.

    Raises as `build`, `check_start` and `named_sparsities` do, and `UserError` if the recipe needs data or a trained
    network and none is named.
    """
    if not config.data:
        raise UserError(f"{config.recipe} needs your images: name them with --data imagefolder:DIR or hub:DIR")
    state_shapes(config.model, 2, 1)
    if config.pretrained is None and config.recipe in FINETUNING:
        raise UserError(f"{config.recipe} starts from a trained dense network: name it with --pretrained FILE")
    if config.pretrained is not None and not has_checkpoint(config):
        check_start(config.pretrained, needs_zeros=config.method == "keep-zeros")
    if config.teacher is not None:
        read_weights(config.teacher)
    if config.budget is not None:
        named_sparsities(config.budget)


def check_images(config: Config, model: nn.Module, example: Tensor, processes: int) -> None:
    """Raise `ValueError` if the network does not take images of this size, or if batch norm would get a single value.

    Batch norm needs at least two values per channel. It gets one from a single image whose size there is 1 x 1.
    """
    height, width = example.shape[2:]
    try:
        norms = single_value_norms(model, example)
    except (RuntimeError, ValueError, AssertionError) as error:  # timm's networks raise these
        raise ValueError(f"--model {config.model}: images of {width}x{height} pixels: {one_line(error)}") from error
    if norms and config.batch_size == processes * config.accumulate:
        part = f" and --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {config.batch_size}{part}: with one image of {width}x{height} pixels at a time, the batch "
            f"norm {norms[0]!r} of {config.model} gets one value per channel; use at least two images at a time"
        )


def has_checkpoint(config: Config) -> bool:
    """Return whether the run resumes from a checkpoint. Then the file of --pretrained is not needed and may be gone."""
    return config.resume and bool(Checkpoints(Path(config.run_dir) / "checkpoints").steps())
