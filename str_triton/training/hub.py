"""Reading of data sets of the Hugging Face hub, and of local folders in its format, with the `datasets` library."""

import contextlib
import hashlib
import logging
import os
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from str_triton.training.errors import is_first_process, warn
from str_triton.training.hub_files import Declared, check_files, stamps
from str_triton.training.hub_saved import empty, read_saved, saved_splits, saved_tables
from str_triton.training.hub_splits import check_copies_of_train

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict

YAML_WORDS = "quote the classes yes, no, on, off, true and false in README.md: YAML reads them as two values"
PARQUET = "refs/convert/parquet"  # the revision in which the hub keeps its conversion of a data set made by a script


def read_splits(
    place: str, separator: str, splits: Collection[str] = (), labels: Iterable[str] = ()
) -> "DatasetDict | dict[str, Dataset]":
    """Return the splits of a data set.

    Args:
        place: NAME or NAME + separator + CONFIGURATION, where NAME is a data set of the hub, or a local folder of
            parquet or arrow files or of `save_to_disk`. If a script makes the data set, the hub's own conversion is
            read.
        separator: the character between NAME and CONFIGURATION.
        splits: the splits whose files are checked; by default all.
        labels: the names that the column of labels may have.

    Raises:
        ValueError: one line, also for errors of the library.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hub:{place} needs the package datasets: pip install 'str-triton[train]'") from None
    if not is_first_process():
        datasets.disable_progress_bars()
    local = local_folder(place, separator)
    with _without_its_messages():
        if local is None:
            return _read_hub(place, separator, datasets)
        try:
            return _read_folder(*local, splits, labels, datasets)
        except Exception as error:  # errors of the library and of damaged files have no common base class
            raise ValueError(f"hub:{place}: {_reason(error)}{_configurations(place, separator, error)}") from error


def local_folder(place: str, separator: str) -> tuple[Path, str] | None:
    """Return the folder and the configuration that `place` names, or None if no such folder is on this machine."""
    name, _, configuration = place.rpartition(separator)
    for folder, chosen in ((place, ""), (name, configuration)):
        if folder and os.path.isdir(os.path.expanduser(folder)):
            return Path(folder).expanduser().resolve(), chosen
    return None


@contextlib.contextmanager
def _without_its_messages() -> Iterator[None]:
    """Silence the libraries' messages of failed attempts to connect and of unreadable files: an error follows them."""
    levels = {"huggingface_hub": logging.ERROR, "datasets.packaged_modules": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _read_folder(
    folder: Path, configuration: str, splits: Collection[str], labels: Iterable[str], datasets: ModuleType
) -> "dict[str, Dataset]":
    saved = saved_splits(folder)
    if saved and configuration:
        raise ValueError(f"a folder of save_to_disk has no configuration {configuration!r}")
    if saved:
        splits_read = {name: read_saved(part, labels) for name, part in saved.items()}
        tables = {name: [path.relative_to(folder) for path in saved_tables(part)] for name, part in saved.items()}
        check_copies_of_train(folder, tables, tables=True)
        return splits_read
    if glob(str(folder)) != [str(folder)]:
        raise ValueError("*, ? and [ in the path of a folder are patterns to the datasets library: rename the folder")
    builder = datasets.load_dataset_builder(str(folder), configuration or None, cache_dir=_cache(datasets))
    for name, feature in (builder.info.features or {}).items():
        if any(isinstance(word, bool) for word in getattr(feature, "names", None) or ()):
            raise ValueError(f"column {name!r} has no words as classes: {YAML_WORDS}")
    check_files(folder, builder, _declared(folder, builder), splits, labels)
    try:
        _prepare(folder, builder, datasets)
    except datasets.exceptions.SplitsVerificationError as error:
        raise ValueError(f"its splits are not those that README.md or dataset_infos.json names: {error}") from error
    _warn_of_lost_rows(folder, builder)
    return {
        name: builder.as_dataset(name) if split.num_examples else empty(builder.info.features)
        for name, split in builder.info.splits.items()
    }


def _warn_of_lost_rows(folder: Path, builder: "DatasetBuilder") -> None:
    """Warn of splits with files but without rows, and of images or sounds that no table of metadata names."""
    for split, paths in (builder.config.data_files or {}).items():
        rows = builder.info.splits[split].num_examples
        single = sum(os.path.splitext(path)[1].lower() in getattr(builder, "EXTENSIONS", ()) for path in paths)
        if rows < single:
            warn(f"hub:{folder}: metadata names {rows:,} of the {single:,} files of '{split}', the others are not read")
        elif rows == 0:
            warn(f"hub:{folder}: '{split}' has no rows, only empty files, such as {os.path.relpath(paths[0], folder)}")


def _cache(datasets: ModuleType) -> str:
    """Return the folder for conversions of local data. The library's own cache may hold outdated ones."""
    return os.path.join(os.path.expanduser(datasets.config.HF_DATASETS_CACHE), "str_triton")


def _prepare(folder: Path, builder: "DatasetBuilder", datasets: ModuleType) -> None:
    """Convert the files, unless these files were converted before.

    The library knows a conversion by the name of the folder and README.md alone. Here its path also depends on the
    folder and on the names, sizes and times of the files. The library locks the path while it writes.
    """
    files = [(split, stamps(paths)) for split, paths in (builder.config.data_files or {}).items()]
    key = hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:24]
    place = f"{builder.cache_dir}/{key}"
    extracted = datasets.DownloadConfig(cache_dir=f"{place}.downloads", use_etag=False)
    builder.download_and_prepare(place, download_config=extracted)


def _read_hub(place: str, separator: str, datasets: ModuleType) -> "DatasetDict":
    if os.path.isfile(os.path.expanduser(place)):
        raise ValueError(f"hub:{place} is a file: name its folder, hub:{os.path.dirname(place) or '.'}")
    name, _, configuration = os.path.expanduser(place).partition(separator)
    try:
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:
        if "scripts are no longer supported" not in str(error):
            reason = f"{_reason(error)}{_configurations(place, separator, error)}"
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
            f"{_reason(error)}"
        ) from error


def _declared(folder: Path, builder: "DatasetBuilder") -> Declared:
    """Return the files, or the folder of the files, that README.md gives the configuration.

    The builder does not hold them, and the library's own way to them lists all files a second time.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card, alone = folder / "README.md", folder / ".huggingface.yaml"
    said = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    if alone.exists():
        said.update(DatasetCard(f"---\n{alone.read_text('utf-8')}\n---\n").data.to_dict())
    options = MetadataConfigs.from_dataset_card_data(said).get(builder.config.name, {})
    if "data_files" in options:
        return Declared(sanitize_patterns(options["data_files"]), None)
    return Declared(None, options.get("data_dir"))


def _reason(error: BaseException) -> str:
    """Return the first line of the message that says what is wrong."""
    if mark := getattr(error, "problem_mark", None):  # of YAML
        return f"line {mark.line + 1} of the YAML in README.md cannot be read: {getattr(error, 'problem', None)}"
    if unknown := re.search("Invalid string class label (.+)", f"{error}\n{error.__cause__}"):
        return f"{unknown[1]!r} is no class: unpack archives of class folders, or correct the names in README.md"
    if "label names are duplicated" in str(error):
        return f"two classes have the same name: {YAML_WORDS}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[:1] == ["An error occurred while generating the dataset"]:
        cause = lines[1:4] or str(error.__cause__).split()
        return textwrap.shorten(" ".join(cause), 400, placeholder=" ...")
    if pattern := re.match(r"Unable to find '(.+)' with any supported extension", lines[0] if lines else ""):
        return f"no files of data match {pattern[1]}, see data_files in README.md"
    return lines[0] if lines else type(error).__name__


def _configurations(place: str, separator: str, error: Exception) -> str:
    """Return how to choose a configuration or a folder if the error is about configurations: "" if it is not."""
    local = local_folder(place, separator)
    if local and local[1] and "not found. Available: " in str(error) and local[0].joinpath(local[1]).is_dir():
        return f"; to read the folder, write hub:{local[0] / local[1]}"
    found = re.search(r"available configs: \[(.*?)\]", str(error))
    return f" Write hub:{place}{separator}NAME, with a NAME of {found[1]}" if found else ""
