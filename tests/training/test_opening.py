from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from str_triton.training.opening import number, opening


@pytest.mark.parametrize(("processes", "precision", "parts"), [(1, "no", 3), (4, "bf16", 5)])
def test_the_lines_name_the_facts_the_device_and_the_folder(processes: int, precision: str, parts: int):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, mixed_precision=precision)
    lines = opening({"data": "a: 3\x1b", "a long one": "b"}, accelerator, Path("runs/x")).splitlines()
    assert [line[:12].strip() for line in lines] == ["data", "a long one", "device", "folder"]
    assert "\x1b" not in lines[0]
    assert lines[0][12:].startswith("a: 3")
    assert [lines[1][12:], lines[3][12:]] == ["b", "runs/x"]
    device = lines[2][12:].split(", ")
    assert device[0] == "cpu"
    assert f"{torch.get_num_threads()} thread" in lines[2]
    assert len(device) >= parts
    assert device[3 - parts :] == ["4 processes", "bf16"] or processes == 1


def test_a_count_has_its_plural():
    assert [number(count, "image") for count in (0, 1, 1437)] == ["0 images", "1 image", "1,437 images"]
