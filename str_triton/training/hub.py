"""Reading of data sets of the Hugging Face hub, and of local folders in its format, with the `datasets` library."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from str_triton.training.errors import is_first_process, warn
from str_triton.training.hub_files import check_files

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PARQUET = "refs/convert/parquet"  # the revision in which the hub keeps its conversion of a data set made by a script


def read_splits(place: str, separator: str) -> "DatasetDict | dict[str, Dataset]":
    """Return the splits of a data set.

    Args:
        place: NAME or NAME + separator + CONFIGURATION of the hub, or a local folder of parquet or arrow files or of
            `save_to_disk`. If a script makes the data set, the hub's own conversion is read.
        separator: the character between NAME and CONFIGURATION.

    Raises:
        ValueError: one line, also for errors of the library.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hub:{place} needs the package datasets: pip install 'str-triton[train]'") from None
    if not is_first_process():
        datasets.disable_progress_bars()
    with _without_its_warnings():
        return _read(place, separator, datasets)


@contextlib.contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Silence the hub library's warnings of each failed attempt to connect; an error follows after the last."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _read(place: str, separator: str, datasets: ModuleType) -> "DatasetDict | dict[str, Dataset]":
    folder = Path(place)
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: _saved(folder / name, datasets) for name in names}
        if (folder / "state.json").is_file():
            return {"train": _saved(folder, datasets)}
        if folder.is_dir():
            check_files(folder, datasets.load_dataset_builder(place).config.data_files or {})
            return datasets.load_dataset(place)
    except Exception as error:  # errors of the library and of damaged files have no common base class
        raise ValueError(f"hub:{place}: {_first_line(error)}{_configurations(place, separator, error)}") from error
    name, _, configuration = place.partition(separator)
    try:
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:
        if "scripts are no longer supported" not in str(error):
            reason = f"{_first_line(error)}{_configurations(place, separator, error)}"
            raise ValueError(f"hub:{place} is no folder here, and on the hub: {reason}") from error
    try:
        if not configuration:
            known = sorted(datasets.get_dataset_config_names(name, revision=PARQUET))
            configuration = known[-1]
            if len(known) > 1:
                other = f"hub:{name}{separator}{known[0]}"
                warn(f"hub:{place} has {', '.join(known)}: using {configuration}; to use another, name it: {other}")
        return datasets.load_dataset(name, configuration, revision=PARQUET)
    except Exception as error:
        raise ValueError(
            f"hub:{place} is made by a script, which is never run, and its revision {PARQUET} cannot be read: "
            f"{_first_line(error)}"
        ) from error


def _saved(folder: Path, datasets: ModuleType) -> "Dataset":
    """Read a split that `save_to_disk` wrote. `load_from_disk` cannot read an empty one, which has no files."""
    if json.loads((folder / "state.json").read_text(encoding="utf-8")).get("_data_files"):
        return datasets.load_from_disk(str(folder))
    features = datasets.DatasetInfo.from_directory(str(folder)).features
    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _configurations(place: str, separator: str, error: Exception) -> str:
    """Return how to choose a configuration if the error says that one must be chosen: "" if it does not."""
    found = re.search(r"available configs: \[(.*?)\]", str(error))
    return f" Write hub:{place}{separator}NAME, with a NAME of {found[1]}" if found else ""
