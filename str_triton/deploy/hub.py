"""Packed files with their cards on the Hugging Face hub, or in a local folder of the same content."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from str_triton.budget.budget import Budget
from str_triton.budget.rank_budget import RankBudget
from str_triton.deploy.model_card import model_card
from str_triton.deploy.pack import pack, unpack
from str_triton.deploy.summary import PackedSummary
from str_triton.programs import extra_named

FILE, CARD = "model.packed.safetensors", "README.md"
DESCRIPTION = "A sparse or low-rank network, packed without its zeros by str-triton."
LOAD = """from str_triton import deploy

state_dict = deploy.from_pretrained("{name}")  # plain dense tensors; damaged bytes raise
model.load_state_dict(state_dict)  # model: the plain network, without thresholds"""


def save_pretrained(
    model: nn.Module | Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    description: str = DESCRIPTION,
    values: str = "float32",
    budget: Budget | RankBudget | None = None,
    metadata: Mapping[str, Any] | None = None,
    **card: Any,
) -> PackedSummary:
    """Write the packed file and its card, README.md, to a folder, as `push_to_hub` uploads them.

    Args:
        model, values, budget, metadata: see `pack`.
        folder: a missing folder is made.
        name: the repository's name on the hub, for the card; by default the folder's.
        description, card: see `model_card`.

    Raises:
        ValueError, TypeError: see `pack` and `model_card`.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    folder.mkdir(parents=True, exist_ok=True)
    summary = pack(model, folder / FILE, values, budget=budget, metadata=metadata)
    options = {"title": name.split("/")[-1], "code": LOAD.format(name=name)} | card
    os.replace(model_card(folder / FILE, description=description, **options), folder / CARD)
    return summary


def push_to_hub(
    model: nn.Module | Mapping[str, Tensor],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Add the packed model",
    **options: Any,
) -> str:
    """Upload the packed file and its card to the hub in one commit, and return the commit's address.

    Args:
        model: see `pack`.
        repo_id: "OWNER/NAME"; a missing repository is made.
        token, private, revision, commit_message: see `huggingface_hub.HfApi`.
        options: see `save_pretrained`.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError, ValueError: the hub refuses or cannot be reached; see `save_pretrained` too.
    """
    with extra_named("hub", "push_to_hub"):
        from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **{"name": repo_id} | options)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
        )


def from_pretrained(
    repository: str | os.PathLike[str],
    *,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    factors: bool = False,
) -> dict[str, Tensor]:
    """Return the state dict of a packed model on the hub, or in a local folder if there is one of this name.

    Args:
        repository: "OWNER/NAME", or a folder that `save_pretrained` has written.
        token, revision, cache_dir: see `huggingface_hub.hf_hub_download`.
        factors: see `unpack`.

    Raises:
        ImportError: huggingface_hub is not installed, and there is no such folder.
        OSError, ValueError: the file is missing, damaged, or cannot be downloaded.
    """
    if Path(repository).is_dir():
        return unpack(Path(repository) / FILE, factors=factors)
    with extra_named("hub", "from_pretrained"):
        from huggingface_hub import hf_hub_download

    folder = None if cache_dir is None else os.fspath(cache_dir)
    path = hf_hub_download(str(repository), FILE, token=token, revision=revision, cache_dir=folder)
    return unpack(path, factors=factors)
