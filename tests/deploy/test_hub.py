"""Packed models as a repository of the hub: a local folder, and what is asked of huggingface_hub."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from str_triton import SparsityController, Target, deploy, plain_state_dict, sparsify


@pytest.fixture
def model() -> nn.Module:
    network = sparsify(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)))
    SparsityController(network, Target(sparsity=0.8)).finish()
    return network


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_folder_is_written_and_read(tmp_path: Path, model: nn.Module) -> None:
    summary = deploy.save_pretrained(model, tmp_path / "digits", license="mit", description="Words of mine.")
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["README.md", "model.packed.safetensors"]
    card = (tmp_path / "digits" / "README.md").read_text()
    assert all(text in card for text in ("# digits", "Words of mine.", 'license: "mit"', 'from_pretrained("digits")'))
    assert summary.nbytes == (tmp_path / "digits" / "model.packed.safetensors").stat().st_size
    assert equal(deploy.from_pretrained(tmp_path / "digits"), plain_state_dict(model.state_dict()))


def test_a_folder_without_a_packed_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.packed\.safetensors"):
        deploy.from_pretrained(tmp_path)


def test_the_hub_gets_one_commit_and_gives_the_same_weights(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here: two methods of its client and its download copy to it and from it."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> SimpleNamespace:
        calls.append(("create", options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: Any, *, repo_id: str, folder_path: str, **options: Any) -> str:
        calls.append((repo_id, options))
        shutil.copytree(folder_path, tmp_path / repo_id)
        return "https://hub/commit/1"

    def download(repo_id: str, filename: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert deploy.push_to_hub(model, "digits", private=True, revision="next") == "https://hub/commit/1"
    assert equal(deploy.from_pretrained("me/digits", revision="next"), plain_state_dict(model.state_dict()))
    assert "# digits\n" in (tmp_path / "me" / "digits" / "README.md").read_text()
    (_, created), (pushed, upload), (asked, download_options) = calls
    assert (created["private"], created["exist_ok"]) == (True, True)
    assert (pushed, asked) == ("me/digits", "me/digits")
    assert upload["revision"] == download_options["revision"] == "next"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: deploy.from_pretrained("owner/name"), lambda: deploy.push_to_hub(nn.Linear(2, 2), "o/n")):
        with pytest.raises(ImportError, match=r"huggingface_hub.*'str-triton\[hub\]'"):
            call()
