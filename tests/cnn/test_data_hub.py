"""Hugging Face data sets, from local files only."""

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from str_triton.cnn.data import batches, load
from tests.messages import holding, holds

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(index: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 11, 3), np.uint8))


def png(index: int) -> bytes:
    file = BytesIO()
    picture(index).save(file, "PNG")
    return file.getvalue()


def rows(
    count: int, first: int = 0, image: str = "image", label: str = "label", classes: int | None = 3
) -> "datasets.Dataset":
    label_feature = datasets.Value("int64") if classes is None else datasets.ClassLabel(names=NAMES[:classes])
    features = datasets.Features({image: datasets.Image(), label: label_feature})
    content = {image: [picture(first + i) for i in range(count)], label: [i % 3 for i in range(count)]}
    return datasets.Dataset.from_dict(content, features=features)


def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir(exist_ok=True)
    return path


def write(root: Path, **splits: "datasets.Dataset") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        part.to_parquet(root / f"{name}.parquet")
    return root


def refused(place: object, message: str) -> None:
    with pytest.raises(ValueError, match=holding(message)) as caught:
        load(f"hub:{place}", None)
    assert "\n" not in str(caught.value)
    assert "on the hub" not in str(caught.value)


def check(data: object, train: int = 12, test: int = 6, first_test: int = 100) -> None:
    assert (len(data.train), len(data.test)) == (train, test)
    assert (data.num_classes, data.image_shape) == (3, (3, 9, 11))
    for images, first in ((data.train, 0), (data.test, first_test)):
        assert torch.equal(images.labels, torch.arange(len(images)) % 3)
        for index in (0, len(images) - 1):
            assert np.array_equal(images.images[index].permute(1, 2, 0), np.asarray(picture(first + index)))


@pytest.mark.parametrize("test_split", ["test", "validation"])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "labels"), ("img", "fine_label")])
def test_parquet_files_in_a_folder(image: str, label: str, test_split: str, tmp_path: Path):
    path = folder(tmp_path)
    rows(12, image=image, label=label).to_parquet(path / "train-00000-of-00001.parquet")
    rows(6, 100, image=image, label=label).to_parquet(path / f"{test_split}-00000-of-00001.parquet")
    data = load(f"hub:{path}", None)
    check(data)
    assert data.name == f"hub:{path}"


PARTS = "data/train-00000-of-00002-0a1b data/train-00001-of-00002-2c3d"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (PARTS, None),
        ("train/0000 train/0001", None),
        (" ".join(f"train/{number}" for number in range(1, 12)), None),
        ("train/2019 train/2021", None),
        ("train-0-of-1", None),
        ("train-1-of-2 train-2-of-2", None),
        ("train/train-0-of-1 train/train", "train/train.parquet .. two versions"),
        ("train/a train/a (2)", "a (2).parquet is a copy of train/a.parquet"),
        ("train/0001 train/0003 train/0004", "missing"),
        ("data/train-00000-of-00001", None),
        ("train-00000-of-00002", "number 1 of 2 .. missing"),
        (f"{PARTS} data/train-00000-of-00001", "train-00000-of-00001.parquet .. two versions"),
        (f"{PARTS} data/train-00001-of-00002", "train-00001-of-00002.parquet .. two versions"),
        ("train-00000-of-00001 train-00000-of-00001 (1)", "two versions"),
        ("a/train-00000-of-00001 b/train-00000-of-00001", "b/train-00000-of-00001.parquet .. two versions"),
        ("train/0000 train/0001 train/0003", "train/0001.parquet .. train/0003.parquet .. missing"),
        ("train/1 train/2 train/5", None),  # days
        ("train/0001 train/84729", None),  # identifiers
        ("train/0000 train/0001 train/9000", None),
        ("train/my-train/a", "train/my-train/a.parquet .. twice"),
        ("train/test/a", "train/test/a.parquet .. twice"),
    ],
)
def test_numbered_files_are_of_one_version_and_complete(names: str, message: str | None, tmp_path: Path):
    files = [folder(tmp_path) / f"{name}.parquet" for name in re.split(r" (?!\()", names)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        rows(6, 10 * number).to_parquet(file)
    test = files[0].with_name("test-00000-of-00001.parquet") if "-of-" in names else folder(tmp_path) / "test/0.parquet"
    test.parent.mkdir(exist_ok=True)
    rows(6, 900).to_parquet(test)
    if message is None:
        assert len(load(f"hub:{folder(tmp_path)}").train) == 6 * len(files)
    else:
        with pytest.raises(ValueError, match=holding(message)):
            load(f"hub:{folder(tmp_path)}")


DECLARED = "{{config_name: all, data_files: [{{split: train, path: {}}}, {{split: test, path: '*/test-*'}}]}}"


@pytest.mark.parametrize(
    ("names", "card", "text", "message"),
    [
        ("0/train-0-of-1 1/train-0-of-1", "README.md", DECLARED.format("'*/train-*'"), None),
        ("0/train-0-of-1 1/train-0-of-1", ".huggingface.yaml", DECLARED.format("'*/train-*'"), None),
        ("0/train-0-of-1 1/train-0-of-1", "README.md", "{config_name: all, data_dir: .}", None),
        ("0/train-0-of-2 1/train-1-of-2", "README.md", DECLARED.format("'*/train-*'"), None),
        ("0/train-0-of-2 0/train-1-of-2", "README.md", DECLARED.format("[0/train-0-of-2.parquet]"), None),
        ("0/train-0-of-2", "README.md", DECLARED.format("[0/train-0-of-2.parquet]"), None),
        ("0/train-0-of-2", "README.md", DECLARED.format("'*/train-*'"), "number 1 of 2"),
        ("0/train-0-of-1 1/train-0-of-1", "README.md", "", "two versions"),
    ],
)
def test_files_that_the_card_declares_may_be_in_folders_or_a_part(
    names: str, card: str, text: str, message: str | None, tmp_path: Path
):
    parts = {name: rows(6, 10 * number) for number, name in enumerate(names.split())}
    for name, part in {**parts, "0/test-0-of-1": rows(3)}.items():
        write((folder(tmp_path) / name).parent, **{Path(name).name: part})
    line = "" if card.endswith("yaml") else "---\n"
    (folder(tmp_path) / card).write_text(f"{line}configs: [{text}]\n{line}data_files:\n")
    if message:
        refused(folder(tmp_path), message)
    else:
        assert len(load(f"hub:{folder(tmp_path)}").train) == 6 * (1 if "[0" in text else len(parts))


def test_the_files_of_a_folder_are_listed_by_the_library_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder(tmp_path), train=rows(30))
    (folder(tmp_path) / "README.md").write_text("---\nconfigs: [{config_name: all, data_files: '*.parquet'}]\n---\n")
    calls, listed = [], datasets.load.dataset_module_factory
    monkeypatch.setattr(datasets.load, "dataset_module_factory", lambda *a, **k: calls.append(a) or listed(*a, **k))
    load(f"hub:{folder(tmp_path)}")
    assert len(calls) == 1


@pytest.mark.parametrize("card", ["", "configs: [{config_name: default, data_files: [{split: train, path: train*}]}]"])
def test_changed_files_and_folders_of_the_same_name_are_read_anew(card: str, tmp_path: Path):
    for number, root in enumerate((tmp_path / "a/data", tmp_path / "b/data", tmp_path / "b/data")):
        write(root, train=rows(30 + 3 * number, 100 * number))
        (root / "README.md").write_text(f"---\n{card}\n---\n")
        os.utime(root / "train.parquet", ns=(1, 10**9 + number * bool(card)))
        train = load(f"hub:{root}").train
        kept = {image.numpy().tobytes() for image in train.images.permute(0, 2, 3, 1)}
        assert kept < {np.asarray(picture(100 * number + i)).tobytes() for i in range(40)}


SWAPPED = datasets.ClassLabel(names=NAMES[::-1])


@pytest.mark.parametrize("card", ["README.md", "dataset_infos.json"])
def test_the_card_names_the_classes_of_the_files(card: str, tmp_path: Path):
    write(folder(tmp_path), train=rows(6), test=rows(3))
    for label, message in ((rows(1).features["label"], None), (SWAPPED, f"{card} .. cat, bee, ant .. train.parquet")):
        info = datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image(), "label": label}))
        (folder(tmp_path) / "README.md").unlink(missing_ok=True)
        if card == "README.md":
            datasets.info.DatasetInfosDict({"default": info}).write_to_directory(str(folder(tmp_path)))
        else:
            (folder(tmp_path) / card).write_text(json.dumps({"default": {"features": info.features.to_dict()}}))
        if message:
            refused(folder(tmp_path), message)
        else:
            assert load(f"hub:{folder(tmp_path)}").class_names == tuple(NAMES)


def test_saved_files_name_the_classes_of_their_split(tmp_path: Path):
    datasets.DatasetDict(train=rows(6), test=rows(3)).save_to_disk(folder(tmp_path), num_shards={"train": 2, "test": 1})
    rows(6).cast_column("label", SWAPPED).save_to_disk(tmp_path / "other", num_shards=2)
    part = "data-00001-of-00002.arrow"
    shutil.copy(tmp_path / "other" / part, folder(tmp_path) / "train" / part)
    refused(folder(tmp_path), f"train/dataset_info.json .. train/{part} .. cat, bee, ant")


@pytest.mark.parametrize("name", ["train.parquet.bak", "train-0-of-1.parquet.orig", "train.geoparquet"])
def test_copies_of_files_are_not_read_unchecked(name: str, tmp_path: Path):
    write(folder(tmp_path), train=rows(6), test=rows(3))
    rows(6).cast_column("label", SWAPPED).to_parquet(folder(tmp_path) / name)
    refused(folder(tmp_path), name)


def test_only_columns_and_splits_that_are_read_are_compared(tmp_path: Path):
    def part(names: list[str], first: int) -> "datasets.Dataset":
        return (
            rows(6, first)
            .add_column("coarse_label", [0] * 6)
            .cast_column("coarse_label", datasets.ClassLabel(names=names))
        )

    write(folder(tmp_path), train=part(["a", "b"], 0), test=part(["b", "a"], 100))
    assert len(load(f"hub:{folder(tmp_path)}").train) == 6
    parts = {"train": rows(6), "test": rows(6, 100)}
    write(tmp_path / "more/data", **{f"{name}-00000-of-00001": part for name, part in parts.items()})
    rows(6).cast_column("label", SWAPPED).to_parquet(tmp_path / "more/data/extra-00000-of-00002.parquet")
    assert len(load(f"hub:{tmp_path / 'more'}").train) == 6


def test_splits_that_are_not_read_are_named(tmp_path: Path, capfd: pytest.CaptureFixture):
    write(folder(tmp_path) / "train", a=rows(30))
    write(folder(tmp_path) / "Validation", a=rows(6))
    assert len(load(f"hub:{folder(tmp_path)}").test) == 6
    assert holds(capfd.readouterr().err, "'train' .. Validation/a.parquet .. lower case")
    (folder(tmp_path) / "train").rename(folder(tmp_path) / "Train")
    refused(folder(tmp_path), "Validation/a.parquet .. 'train' .. lower case")
    write(tmp_path / "named" / "data", **{f"{name}-00000-of-00001": rows(30) for name in ("train", "extra")})
    load(f"hub:{tmp_path / 'named'}")
    assert holds(capfd.readouterr().err, "fifth of 'train' .. 'extra'")


def test_arrow_files_may_have_a_footer(tmp_path: Path):
    import pyarrow

    for name, part in (("train", rows(12)), ("test", rows(6, 100))):
        table = part.with_format("arrow")[:]
        with pyarrow.ipc.new_file(folder(tmp_path) / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
    check(load(f"hub:{folder(tmp_path)}", None))


@pytest.mark.parametrize("saved", [True, False])
def test_all_splits_number_their_classes_alike(saved: bool, tmp_path: Path):
    swapped = rows(6).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    splits = datasets.DatasetDict(train=rows(6), test=swapped)
    if saved:
        splits.save_to_disk(folder(tmp_path))
    else:
        for name, part in splits.items():
            part.to_parquet(folder(tmp_path) / f"{name}.parquet")
    with pytest.raises(ValueError, match=holding("train .. test .. ant, bee, cat .. cat, bee, ant")):
        load(f"hub:{folder(tmp_path)}")


def test_a_saved_set_and_its_arrow_files(tmp_path: Path):
    splits = datasets.DatasetDict(train=rows(12), test=rows(6, 100))
    splits.save_to_disk(folder(tmp_path))
    check(load(f"hub:{tmp_path / 'data'}", None))


def test_a_saved_set_without_splits_holds_a_fifth_out(tmp_path: Path):
    rows(30).save_to_disk(folder(tmp_path))
    data = load(f"hub:{tmp_path / 'data'}", None)
    counts = [torch.bincount(part.labels).tolist() for part in (data.train, data.test)]
    assert counts == [[8, 8, 8], [2, 2, 2]]
    again = load(f"hub:{tmp_path / 'data'}", None)
    assert torch.equal(again.test.images, data.test.images)
    stored = {png(index): index % 3 for index in range(30)}
    for part in (data.train, data.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            file = BytesIO()
            PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
            assert stored.pop(file.getvalue()) == label
    assert not stored


@pytest.mark.parametrize("count", [1, 6])
def test_a_test_split_that_hides_its_labels_is_passed_over(count: int, tmp_path: Path):
    hidden = rows(count, 200, classes=None).map(lambda row: {"label": -1})
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=NAMES))
    splits = datasets.DatasetDict(train=rows(12), test=hidden, validation=rows(6, 100))
    splits.save_to_disk(folder(tmp_path))
    check(load(f"hub:{tmp_path / 'data'}", None))


@pytest.mark.parametrize("kind", ["bytes", "dict of bytes", "dict of paths", "paths"])
def test_columns_without_hugging_face_features(kind: str, tmp_path: Path):
    """As pyarrow or pandas write them: plain bytes or structs, labels plain integers."""
    import pyarrow
    import pyarrow.parquet

    path = folder(tmp_path)
    for split, count, first in (("train", 12, 0), ("test", 6, 100)):
        images = [png(first + i) for i in range(count)]
        if kind == "dict of bytes":
            images = [{"bytes": image, "path": "gone.png"} for image in images]
        if kind == "dict of paths":
            for i, image in enumerate(images):
                (path / f"{split}{i}.png").write_bytes(image)
            images = [{"bytes": None, "path": f"../{split}{i}.png"} for i in range(count)]
        if kind == "paths":
            for i, image in enumerate(images):
                (path / f"{split}{i}.png").write_bytes(image)
            images = [f"../{split}{i}.png" for i in range(count)]
        table = pyarrow.table({"image": images, "label": [i % 3 for i in range(count)]})
        (path / "files").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, path / "files" / f"{split}.parquet")
    check(load(f"hub:{path / 'files'}", None))


def test_large_images_are_decoded_by_workers(tmp_path: Path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = {"image": [picture(i).resize((90, 80)) for i in range(9)], "label": [i % 3 for i in range(9)]}
    data = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(train=data, test=data.select(range(6))).save_to_disk(folder(tmp_path))
    train = load(f"hub:{tmp_path / 'data'}", None).train
    assert not train.in_memory
    alone, helped = (
        list(batches(train, batch_size=4, seed=0, epoch=0, augment=True, shuffle=True, workers=workers))
        for workers in (0, 2)
    )
    assert alone[0][0].shape == (4, 3, 224, 224)
    for first, second in zip(alone, helped, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_a_name_of_the_hub_and_its_configuration_are_passed_on(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, configuration: str | None) -> dict:
        asked.append((name, configuration))
        return {"train": rows(12), "test": rows(6, 100)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load("hub:owner/name", None))
    check(load("hub:owner/name:plain", None))
    assert asked == [("owner/name", None), ("owner/name", "plain")]


def test_what_the_library_says_becomes_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(name: str, configuration: str | None) -> dict:
        raise RuntimeError("\n  no such thing\nsee the manual\n")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"hub:owner/name .*no such thing"):
        load("hub:owner/name", None)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=holding("datasets .. pip install 'str-triton[train]'")):
        load("hub:owner/name", None)


def broken_image() -> "datasets.Dataset":
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = [{"bytes": png(i)[: 100 if i == 4 else None], "path": None} for i in range(6)]
    return datasets.Dataset.from_dict({"image": content, "label": [0, 1, 2] * 2}, features=features)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (lambda: {"test": rows(6)}, "'train'.* 'test'"),
        (lambda: {"train": rows(6).select([])}, "zero images .*'train'"),
        (
            lambda: {"train": rows(6).rename_column("image", "photo")},
            "'image' or 'img'.* photo, label",
        ),
        (lambda: {"train": rows(6).remove_columns("label")}, "'label' or 'labels' or 'fine_label'"),
        (lambda: {"train": rows(6), "test": rows(6).remove_columns("label")}, "test .*'label'"),
        (lambda: {"train": rows(6), "test": rows(6).remove_columns("image")}, "test .*'image'"),
        (
            lambda: {"train": rows(6).cast_column("label", datasets.Value("string"))},
            "'label' .* '0'; .*class_encode_column",
        ),
        (lambda: {"train": rows(6).cast_column("label", datasets.Value("float32"))}, "'label' .* 0.0; .*int64"),
        (
            lambda: {"train": rows(6, classes=None), "test": wide()},
            "test: .* 0 to 3.* 0 to 2",
        ),
        (lambda: {"train": broken_image(), "test": rows(3)}, r"train\[4\]: .*truncated"),
        (lambda: {"train": rows(6), "test": broken_image()}, r"test\[4\]: .*readable image"),
        (lambda: {"train": numbers()}, r"train\[\d\]: .*'image' .*neither"),
        (lambda: {"train": nulls("image")}, r"train\[\d\]: .*'image' .*neither"),
        (lambda: {"train": nulls("label")}, "'label' .* None in row 0"),
        (lambda: {"train": labelled([0] * 6)}, "all labels are 0\\b"),
        (lambda: {"train": labelled([True] * 6)}, "all labels are 1"),
        (lambda: {"train": labelled([0, 1, -1, 0, 1, -1])}, "2 of 6 .* -1\\b"),
        (lambda: {"train": labelled([-1] * 6)}, "6 of 6 .*negative"),
        (lambda: {"train": labelled([7, 900_000] * 3)}, "900,000.* 2 different"),
        (lambda: {"train": labelled([[0], [1]] * 3)}, r"'label' .* \[0\]"),
        (lambda: {"train": labelled([{"fine": 1}] * 6)}, r"'label' .* \{'fine': 1\}"),
    ],
)
def test_a_wrong_set_is_refused_in_one_line(splits: Callable[[], dict], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration: splits())
    with pytest.raises(ValueError, match=message) as caught:
        load("hub:owner/name", None)
    assert "hub:owner/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def labelled(labels: list) -> "datasets.Dataset":
    return datasets.Dataset.from_dict({"image": [{"bytes": png(i)} for i in range(len(labels))], "label": labels})


def test_labels_may_be_booleans(tmp_path: Path):
    splits = datasets.DatasetDict(train=labelled([True, False] * 3), test=labelled([True, False]))
    splits.save_to_disk(folder(tmp_path))
    data = load(f"hub:{tmp_path / 'data'}", None)
    assert (data.num_classes, data.train.labels.tolist(), data.test.labels.tolist()) == (2, [1, 0] * 3, [1, 0])


def test_a_class_without_images_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    labelled([1, 2] * 5).save_to_disk(folder(tmp_path))
    assert load(f"hub:{tmp_path / 'data'}", None).num_classes == 3
    assert "1 of the 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize("image", [None, "feature"])
def test_an_empty_saved_split(image: str | None, tmp_path: Path):
    empty = rows(6).select([]) if image else datasets.Dataset.from_dict({"image": [], "label": []})
    datasets.DatasetDict(train=empty, test=rows(3)).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"zero images .*'train'"):
        load(f"hub:{tmp_path / 'empty'}", None)
    datasets.DatasetDict(train=rows(12), test=empty, validation=rows(6, 100)).save_to_disk(folder(tmp_path))
    check(load(f"hub:{tmp_path / 'data'}", None))


def wide() -> "datasets.Dataset":
    return datasets.Dataset.from_dict({"image": [{"bytes": png(i)} for i in range(4)], "label": [0, 1, 2, 3]})


def numbers() -> "datasets.Dataset":
    return datasets.Dataset.from_dict({"image": [[1, 2]] * 6, "label": [0, 1, 2] * 2})


def nulls(column: str) -> "datasets.Dataset":
    content = {"image": [{"bytes": png(i)} for i in range(6)], "label": [0, 1, 2] * 2}
    content[column] = [None] * 6
    return datasets.Dataset.from_dict(content)


def test_a_folder_without_data_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=f"^hub:{folder(tmp_path)}: ") as caught:
        load(f"hub:{folder(tmp_path)}", None)
    assert "\n" not in str(caught.value)
    (folder(tmp_path) / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=f"^hub:{folder(tmp_path)}: ") as caught:
        load(f"hub:{folder(tmp_path)}", None)
    assert "\n" not in str(caught.value)


def test_the_configurations_of_a_folder_are_named(tmp_path: Path):
    names = ("plain", "small")
    lines = [f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in names]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    for name in names:
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / name / "train.parquet")
    with pytest.raises(ValueError, match=holding(f"hub:{tmp_path}:NAME .. 'plain', 'small'")) as caught:
        load(f"hub:{tmp_path}", None)
    assert "\n" not in str(caught.value)


def configurations(root: Path, *names: str) -> None:
    lines = [f"- config_name: {name}\n  data_dir: {name}" for name in names]
    (root / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")


def test_a_configuration_of_a_folder_is_checked_like_a_folder(tmp_path: Path):
    root = folder(tmp_path)
    configurations(root, "good", "bad")
    for name in ("train", "test"):
        (root / f"{name}.png").write_bytes(png(0))
        write(root / "good", **{name: datasets.Dataset.from_dict({"image": [f"{name}.png"] * 2, "label": [0, 1]})})
    rows(6).to_parquet(write(root / "bad", test=rows(3)) / "train-00000-of-00002.parquet")
    assert np.array_equal(load(f"hub:{root}:good", None).test.images[0].permute(1, 2, 0), np.asarray(picture(0)))
    refused(f"{root}:bad", "bad/train-00000-of-00002.parquet .. number 1 of 2")
    refused(f"{root}:new", "'new' .. 'good', 'bad'")
    (root / "new").mkdir()
    refused(f"{root}:new", f"'new' .. 'good', 'bad' .. hub:{root}/new")


def test_the_name_of_a_folder_may_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write(folder(tmp_path), train=rows(12), test=rows(6, 100)))
    for place in (".", "~/data", "../data:default"):
        check(load(f"hub:{place}", None))
    refused("train.parquet", "is a file .. hub:.")
    refused("~/data/test.parquet", "is a file .. hub:~/data")
    write(tmp_path / "my [v2]", train=rows(12))
    refused(tmp_path / "my [v2]", "rename")


def test_an_empty_split_of_a_folder_of_parquet_files(tmp_path: Path):
    write(folder(tmp_path), train=rows(12), test=rows(6).select([]), validation=rows(6, 100))
    (tmp_path / "data" / "state.json").write_text('{"step": 3}')  # of another tool
    check(load(f"hub:{folder(tmp_path)}", None))


def test_files_that_do_not_fit_are_named(tmp_path: Path, capfd: pytest.CaptureFixture):
    write(folder(tmp_path), train=rows(12), test=rows(6).add_column("id", list(range(6))))
    refused(folder(tmp_path), "test.parquet .. 'id' .. train.parquet")
    infos = {"default": {"splits": {name: {"name": name, "num_examples": 12} for name in ("train", "dev")}}}
    write(folder(tmp_path), test=rows(6))
    (tmp_path / "data" / "dataset_infos.json").write_text(json.dumps(infos))
    refused(folder(tmp_path), "splits .. dataset_infos.json .. 'dev'")
    content = (folder(tmp_path) / "test.parquet").read_bytes()
    for damaged, message in (
        (b"", "empty"),
        (content[:-9], "again"),
        (b"version https://git-lfs.github.com", "lfs pull"),
    ):
        (folder(tmp_path) / "test.parquet").write_bytes(damaged)
        refused(folder(tmp_path), f"test.parquet .. {message}")
    assert "Failed to read file" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_labels_of_tables_beside_images_are_not_replaced_by_folders(kind: str, tmp_path: Path):
    import pandas

    root = folder(tmp_path)
    for split, count, first in (("train", 12, 0), ("test", 6, 100)):
        names = [f"{split}/batch{i % 2}/{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(first + i).save(root / name)
        table = pandas.DataFrame({"image": names, "label": [i % 3 for i in range(count)]})
        {"csv": table.to_csv, "json": table.to_json, "parquet": table.to_parquet}[kind](root / f"{split}.{kind}")
    refused(root, f"folders .. labels .. test.{kind} .. README.md .. data_files")
    (root / "classes.json").write_text('["batch0", "batch1"]')
    files = ", ".join(f"{{split: {split}, path: {split}.{kind}}}" for split in ("train", "test"))
    (root / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: [{files}]}}]\n---\n")
    if kind == "parquet":
        check(load(f"hub:{root}"))
    for split in ("train", "test"):
        (root / f"{split}.{kind}").unlink()
    (root / "README.md").unlink()
    assert load(f"hub:{root}").class_names == ("batch0", "batch1")


FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("dataset_infos.json", {"default": {"features": FEATURES.to_dict()}}, False),
        ("classes.json", {"labels": NAMES}, False),
        ("ids.json", {"labels": {"0": "ant", "1": "bee", "2": "cat"}}, False),
        ("croissant.json", {"@context": {"label": "x"}}, False),
        ("coco.json", {"images": [{"file_name": "3.png"}], "labels": [], "categories": [{"label": "ant"}]}, False),
        ("settings.json", '{"label": 0, /* of */ }', False),
        ("counts.csv", "label,count\nant,10\nbee,3", False),
        ("classes.csv", "id;label\n0;ant\n1;bee\n2;cat", False),
        ("sample_submission.csv", "id,label\n3.png,0\n4.png,0", False),
        ("some.csv", "file,label\n3.png,0\n4.png,1", True),
        ("some.csv", "label;file\n0;train/ant/3.png\n1;4.png", True),
        ("ids.csv", "id,label\n" + "\n".join(f"{i},{i % 3}" for i in range(12)), True),
        ("rows.json", [{"file": "3.png", "label": 0}, {"file": "4.png", "label": 1}], True),
        ("lines.jsonl", '{"file": "3.png", "label": 0}\n{"file": "4.png", "label": 1}', True),
        ("inner.json", {"images": [{"file": "3.png", "label": 0}, {"file": "4.png", "label": 1}]}, True),
        ("columns.json", {"file": ["3.png", "4.png"], "label": [0, 1]}, True),
        ("names.json", {"3.png": {"label": 0}, "4.png": {"label": 1}}, True),
        ("pairs.json", {"labels": [["3.png", 0], ["4.png", 1]]}, True),
        ("map.json", {"labels": {"3.png": 0, "4.png": 1}}, True),
    ],
)
def test_only_tables_that_label_the_images_are_refused(name: str, content: object, labels: bool, tmp_path: Path):
    root = folder(tmp_path)
    for number in range(18):
        path = root / ("train" if number < 12 else "test") / NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if labels:
        refused(root, f"folders .. labels .. {name}")
    else:
        assert load(f"hub:{root}").class_names == tuple(NAMES)


def test_archives_of_class_folders_are_to_be_unpacked(tmp_path: Path):
    for number, split in enumerate(("train", "test")):
        with zipfile.ZipFile(folder(tmp_path) / f"{split}.zip", "w") as archive:
            for i in range(3):
                archive.writestr(f"{NAMES[i]}/{i}.png", png(10 * number + i))
    refused(folder(tmp_path), "unpack")


def test_the_separator_of_a_table_is_named(tmp_path: Path):
    listed(folder(tmp_path), "train.csv", [0, 1, 2] * 4)
    table = folder(tmp_path) / "train.csv"
    table.write_text(table.read_text().replace(",", ";"))
    refused(folder(tmp_path), """image;label .. commas .. sep: ";" .. README.md""")
    (folder(tmp_path) / "README.md").write_text(
        "---\nconfigs: [{config_name: all, data_files: '*.csv', sep: ;}]\n---\n"
    )
    assert load(f"hub:{folder(tmp_path)}").num_classes == 3


def test_classes_may_bear_names_of_splits_if_the_card_declares_the_files(tmp_path: Path):
    for number, name in enumerate(("train/train/0", "train/test/1", "test/train/0", "test/test/1")):
        (folder(tmp_path) / name).parent.mkdir(parents=True)
        picture(number).save(folder(tmp_path) / f"{name}.png")
    refused(folder(tmp_path), "twice .. README.md .. train/** and test/**")
    declare(folder(tmp_path), "{split: train, path: train/**}, {split: test, path: test/**}")
    assert load(f"hub:{folder(tmp_path)}").class_names == ("test", "train")


def test_images_of_unequal_depths_have_no_classes(tmp_path: Path):
    for number, name in enumerate(("train/ant/0", "train/bee/1", "test/0")):
        (folder(tmp_path) / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder(tmp_path) / f"{name}.png")
    refused(folder(tmp_path), "test/0.png lies higher than train/ant/0.png .. classes")


@pytest.mark.parametrize(
    "link", ["test", "train/more", "train/b.parquet", "hidden/.link", "train/up", "declared/0", "declared/c.parquet"]
)
def test_links_to_data_are_not_passed_over(link: str, tmp_path: Path):
    write(tmp_path / "store", a=rows(6, 100))
    root = folder(tmp_path)
    write(root / "train", a=rows(12))
    (root / link).parent.mkdir(exist_ok=True)
    if link.startswith("declared"):
        files = "{split: train, path: train/a.parquet}, {split: test, path: declared/**}"
        (root / "README.md").write_text(f"---\nconfigs: [{{config_name: all, data_files: [{files}]}}]\n---\n")
        write(root / "declared", b=rows(6, 200))
    elif link != "test":
        write(root / "test", a=rows(6, 100))
    target = "gone" if link.endswith(".parquet") else root if link == "train/up" else tmp_path / "store"
    (root / link).symlink_to(target)
    if link in ("hidden/.link", "train/up"):
        check(load(f"hub:{root}"))
    else:
        refused(root, f"{link} is a link")


def test_splits_that_were_saved_one_by_one(tmp_path: Path):
    root = folder(tmp_path)
    for name, part in (("train", rows(12)), ("test", rows(6, 100))):
        part.with_format("numpy").save_to_disk(root / name)
        datasets.load_from_disk(root / name).map(lambda row: {"label": 0})  # leaves cache-*.arrow beside the data
    check(load(f"hub:{root}"))


@pytest.mark.parametrize("name", ["dev", "eval"])
@pytest.mark.parametrize("kind", ["saved", "declared", "files"])
def test_dev_and_eval_are_names_of_a_split_to_test_on(kind: str, name: str, tmp_path: Path):
    root = folder(tmp_path)
    if kind == "saved":
        datasets.DatasetDict({"train": rows(12), name: rows(6, 100)}).save_to_disk(root)
    else:
        write(root, **{"train": rows(12), name: rows(6, 100)})
    if kind == "declared":
        declare(root, f"{{split: train, path: train.parquet}}, {{split: {name}, path: {name}.parquet}}")
    check(load(f"hub:{root}"))


FEATURES_CARD = (
    "dataset_info: {{features: [{{name: image, dtype: image}}, "
    "{{name: label, dtype: {{class_label: {{names: {{'0': {}, '1': {}}}}}}}}}]}}"
)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\na: [\n---\n", "line 1 .. README.md"),
        ("configs: [{config_name: all, data_files: tset.parquet}]", "data/tset.parquet .. README.md"),
        (FEATURES_CARD.format("yes", "on"), "two classes .. same name .. quote .. README.md"),
        (FEATURES_CARD.format("off", "on"), "'label' .. quote .. README.md"),
        (FEATURES_CARD.format("ant", "bee"), "train.parquet .. ant, bee"),
    ],
)
def test_faults_of_the_card_are_named(card: str, message: str, tmp_path: Path):
    root = write(folder(tmp_path), train=rows(6))
    (root / "README.md").write_text(card if card.startswith("---") else f"---\n{card}\n---\n")
    refused(root, message)
    with pytest.raises(ValueError, match=r"^.{,300}$"):
        load(f"hub:{root}")


@pytest.mark.parametrize("train", ["dict", ".", "train"])
@pytest.mark.parametrize("test", ["test", "test.parquet", "old/test.jsonl"])
def test_what_lies_beside_saved_splits_is_named(train: str, test: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    root = folder(tmp_path)
    if train == "dict":
        datasets.DatasetDict(train=rows(30)).save_to_disk(root)
    else:
        rows(30).save_to_disk(root / train)
    (root / "classes.json").write_text("{}")
    load(f"hub:{root}")
    assert "not read" not in capfd.readouterr().err
    (root / test).parent.mkdir(exist_ok=True)
    part = rows(6, 100)
    {"": part.save_to_disk, ".parquet": part.to_parquet, ".jsonl": part.remove_columns("image").to_json}[
        Path(test).suffix
    ](root / test)
    data = load(f"hub:{root}")
    if (train, test) == ("train", "test"):
        assert len(data.test) == 6
    else:
        assert holds(capfd.readouterr().err, f"'train'; .. not read: {test};")


def test_saved_data_sets_are_named_when_one_is_gone_or_to_be_chosen(tmp_path: Path):
    saved = datasets.DatasetDict(train=rows(12), test=rows(6, 100))
    for name in ("big", "small"):
        saved.save_to_disk(folder(tmp_path) / name)
    refused(folder(tmp_path), f"big, small .. hub:{folder(tmp_path)}/big")
    check(load(f"hub:{folder(tmp_path)}/small"))
    declare(folder(tmp_path), ", ".join(f"{{split: {name}, path: big/{name}/*.arrow}}" for name in ("train", "test")))
    check(load(f"hub:{folder(tmp_path)}"))
    shutil.rmtree(folder(tmp_path) / "small/test")
    refused(folder(tmp_path) / "small", "dataset_dict.json .. 'test' .. copy it again")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("train/a Test/a", None),
        ("Train Test", "Test.parquet .. 'train' .. lower case"),
        ("train/a train/test/a", "twice"),
    ],
)
def test_a_declared_folder_is_checked_like_any(
    names: str, message: str | None, tmp_path: Path, capfd: pytest.CaptureFixture
):
    root = folder(tmp_path)
    configurations(root, "part")
    write(root / "other", extra=rows(3))
    for number, name in enumerate(names.split()):
        path = root / "part" / name
        write(path.parent, **{path.name: rows(30, 100 * number)})
    if message:
        refused(root, message)
    else:
        assert len(load(f"hub:{root}").test) == 6
        assert holds(capfd.readouterr().err, "not read: part/Test/a.parquet;")


def test_files_of_the_same_content_are_refused_unless_they_are_empty(tmp_path: Path):
    root = folder(tmp_path)
    write(root / "train", a=rows(6), b=rows(6, 20), c=rows(6).select([]), d=rows(6).select([]))
    write(root / "test", a=rows(3, 100))
    assert len(load(f"hub:{root}").train) == 12
    write(root / "train/old", x=rows(6))
    refused(root, "train/old/x.parquet is a copy of train/a.parquet")


def declare(root: Path, files: str) -> None:
    (root / "README.md").write_text(f"---\nconfigs: [{{config_name: all, data_files: [{files}]}}]\n---\n")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("[data/train*, data/*0.parquet]", "data/test*", "train0.parquet .. twice .. README.md"),
        ("data/*.parquet", "data/test*", "test0.parquet .. README.md .. 'train' and 'test'"),
        ("data/train0.parquet", "data/*", "train0.parquet .. README.md .. 'train' and 'test'"),
        ("data/train*", "data/test*", None),
    ],
)
def test_a_declared_file_is_in_one_split_once(train: str, test: str, message: str | None, tmp_path: Path):
    write(folder(tmp_path) / "data", train0=rows(12), test0=rows(6, 100))
    declare(folder(tmp_path), f"{{split: train, path: {train}}}, {{split: test, path: {test}}}")
    if message:
        refused(folder(tmp_path), message)
    else:
        check(load(f"hub:{folder(tmp_path)}"))


def test_splits_other_than_train_may_share_a_declared_file(tmp_path: Path):
    write(folder(tmp_path) / "data", train0=rows(12), test0=rows(6, 100))
    splits = ", ".join(f"{{split: {name}, path: data/test*}}" for name in ("validation", "test"))
    declare(folder(tmp_path), f"{{split: train, path: data/train*}}, {splits}")
    check(load(f"hub:{folder(tmp_path)}"))


def test_class_folders_without_train_are_refused_in_words(tmp_path: Path):
    (folder(tmp_path) / "test" / "ant").mkdir(parents=True)
    picture(0).save(folder(tmp_path) / "test" / "ant" / "0.png")
    refused(folder(tmp_path), "no split 'train', only 'test'")


def test_declared_splits_of_images_share_no_table(tmp_path: Path):
    root = folder(tmp_path)
    for split in ("train", "test"):
        (root / split).mkdir()
        picture(0).save(root / split / "0.png")
    (root / "metadata.csv").write_text("file_name,label\ntrain/0.png,0\ntest/0.png,1")
    declare(root, ", ".join(f"{{split: {split}, path: [{split}/*, metadata.csv]}}" for split in ("train", "test")))
    refused(root, "metadata.csv .. README.md .. 'train' and 'test'")


def test_booleans_and_numbers_are_not_joined(tmp_path: Path):
    write(folder(tmp_path) / "test", a=labelled([0, 1, 2]))
    for first, second in (("a", "b"), ("b", "a")):
        write(folder(tmp_path) / "train", **{first: labelled([True, False] * 3), second: labelled([0, 1, 2] * 2)})
        refused(folder(tmp_path), f"is bool in train/{first}.parquet, but numbers in train/{second}.parquet")


def test_the_card_may_name_booleans(tmp_path: Path):
    write(folder(tmp_path), train=labelled([True, False] * 3), test=labelled([True, False]))
    label = "{name: label, dtype: {class_label: {names: {'0': 'no', '1': 'yes'}}}}"
    (folder(tmp_path) / "README.md").write_text(
        f"---\ndataset_info: {{features: [{{name: image, dtype: image}}, {label}]}}\n---\n"
    )
    assert load(f"hub:{folder(tmp_path)}").class_names == ("no", "yes")


def listed(root: Path, name: str, labels: list, first: int = 0) -> None:
    """Write images and a table of their paths, as the ending of its name says."""
    import pandas

    (root / name).parent.mkdir(parents=True, exist_ok=True)
    for i in range(len(labels)):
        picture(first + i).save(root / f"{first + i}.png")
    table = pandas.DataFrame({"image": [f"{first + i}.png" for i in range(len(labels))], "label": labels})
    if ".csv" in name:
        table.to_csv(root / name, index=False)
    else:
        table.to_json(root / name, orient="records", lines=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train-0-of-1 (1).{}", "train-0-of-1 (1) .. two versions"),
        ("train_old.{}", "copy of train-0-of-1 .. train_old"),
        ("train-0-of-1.{}.bak", "train-0-of-1.{}.bak .. move it away"),
        ("test.{}.gz", "test.{}.gz .. copy"),
        ("train-1-of-2.{}", "two versions"),
        ("train_1.{} train_2.{}.gz", None),
    ],
)
def test_tables_as_text_are_checked_like_others(kind: str, more: str, message: str | None, tmp_path: Path):
    root, rest = folder(tmp_path), re.split(r" (?!\()", more.format(kind, kind))
    listed(root, f"train-0-of-1.{kind}", [0, 1, 2] * 4)
    listed(root, f"test.{kind}", [0, 1, 2] * 2, 100)
    for number, name in enumerate(rest):
        listed(root, name, [0, 1, 2] * 4, 20 + 20 * number if message is None else 0)
    if message:
        refused(root, message.format(kind))
    else:
        assert len(load(f"hub:{root}").train) == 36


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([True, False] * 6, [0, 1, 2], "'label' is bool in train/a.{0}, but numbers in test/a.{0}"),
        (["ant", "bee"] * 6, [0, 1, 2], "'label' is text in train/a.{0}, but numbers in test/a.{0}"),
        ([0, 1, 2] * 4, [True, False, True], "'label' is bool in test/a.{0}, but numbers in train/a.{0}"),
        ([0, 1, 2] * 4, [None] * 3, "test .. holds None"),
        ([0, 1, 2] * 4, [0.0, 1.0, 2.0], None),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_of_tables_as_text_are_of_one_kind(
    kind: str, train: list, test: list, message: str | None, tmp_path: Path
):
    root = folder(tmp_path)
    for number, (name, labels) in enumerate({"train/a": train, "train/b": [], "train/c": [], "test/a": test}.items()):
        listed(root, f"{name}.{kind}", labels, 20 * number)
    if kind == "jsonl":
        (root / "train/d.jsonl").write_text("")
    if message is None:
        assert len(load(f"hub:{root}").train) == 12
    else:
        refused(root, message.format(kind))


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_a_test_split_without_labels_is_passed_over(saved: bool, missing: bool, tmp_path: Path):
    bare = rows(6, 200).remove_columns("label")
    hidden = bare if missing else bare.add_column("label", [None] * 6).cast_column("label", rows(1).features["label"])
    splits = datasets.DatasetDict(train=rows(12), test=hidden, validation=rows(6, 100))
    if saved:
        splits.save_to_disk(folder(tmp_path))
    else:
        write(folder(tmp_path), **splits)
    check(load(f"hub:{folder(tmp_path)}"))


def test_labels_that_train_lacks_are_refused(tmp_path: Path):
    write(folder(tmp_path), train=labelled([1, 2, 3] * 2), test=labelled([0, 1, 2]))
    refused(folder(tmp_path), "'test' has the class '0' (label 0) .. 'train' has no image")


def test_classes_that_the_test_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(folder(tmp_path), train=rows(12), test=rows(2, 100))
    check(load(f"hub:{folder(tmp_path)}"), test=2)
    assert holds(capsys.readouterr().err, "'test' has no image of 1 of the 3 classes .. 'cat'")


@pytest.mark.parametrize("validation", [True, False])
def test_a_test_split_with_equal_labels_is_taken_as_hidden(
    validation: bool, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write(folder(tmp_path), train=rows(30), test=rows(6, 200).map(lambda row: {"label": 0}))
    if validation:
        write(folder(tmp_path), validation=rows(6, 100))
    data, said = load(f"hub:{folder(tmp_path)}"), capsys.readouterr().err
    assert (len(data.train), len(data.test)) == ((30, 6) if validation else (24, 6))
    assert holds(said, "'test' is not read .. all its labels are 0")
    assert ("fifth" in said) != validation


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_test_table_is_no_copy_of_train(kind: str, tmp_path: Path):
    if kind == "saved":
        datasets.DatasetDict(train=rows(6), validation=rows(6)).save_to_disk(folder(tmp_path))
        refused(folder(tmp_path), "validation/data-00000-of-00001.arrow .. 'validation' .. copy .. 'train'")
    else:
        write(folder(tmp_path), train=rows(6), test=rows(6))
        refused(folder(tmp_path), "test.parquet .. 'test' .. copy of train.parquet")


@pytest.mark.parametrize("copies", [6, 1, 0])
def test_copies_of_test_images_in_train_are_found(copies: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    names = [f"train/{NAMES[i % 3]}/{i}.png" for i in range(12)] + [f"test/{NAMES[i % 3]}/{i}.png" for i in range(6)]
    names += [f"train/{NAMES[i % 3]}/more{i}.png" for i in range(copies)]
    for i, name in enumerate(names):
        (folder(tmp_path) / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i if i < 18 else i - 6).save(folder(tmp_path) / name)
    if copies == 6:
        refused(folder(tmp_path), "test/ant/0.png .. 'test' .. copy of train/ant/more0.png")
    else:
        load(f"hub:{folder(tmp_path)}")
        assert holds(capsys.readouterr().err, "6 files of 'test' .. 1 are copies .. test/ant/0.png") == (copies == 1)


def test_splits_name_no_common_images(tmp_path: Path):
    for split, first in (("train", 0), ("test", 11)):
        listed(folder(tmp_path), f"{split}.jsonl", [0, 1, 2] * 4, first)
    refused(folder(tmp_path), "1 of the 12 files .. 'test' .. 'train' .. 11.png")


def test_a_column_that_may_name_the_split_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(folder(tmp_path), data=rows(30).add_column("split", ["train", "test"] * 15))
    load(f"hub:{folder(tmp_path)}")
    assert holds(capsys.readouterr().err, "a fifth of 'train' is held out .. not read: column 'split'")


def test_images_that_no_metadata_names_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    root = folder(tmp_path)
    for first, split in ((0, "train"), (100, "test")):
        (root / split).mkdir()
        for i in range(12):
            picture(first + i).save(root / split / f"{i}.png")
    table = "file_name,label\n" + "\n".join(f"{i}.png,{i % 3}" for i in range(6))
    (root / "train/metadata.csv").write_text(table)
    assert len(load(f"hub:{root}").train) + len(load(f"hub:{root}").test) == 6
    said = capsys.readouterr().err
    assert holds(said, "names 6 of the 12 files of 'train' .. names 0 of the 12 files of 'test' .. 'test' (0 rows)")
    (root / "test/metadata.csv").write_text(table)
    check(load(f"hub:{root}"), 6)
    assert "fifth" not in capsys.readouterr().err


def test_names_of_classes_may_be_numbers_to_yaml(tmp_path: Path):
    write(folder(tmp_path), train=rows(6, classes=None), test=rows(3, classes=None))
    names = "names: {'0': 10, '1': 11, '2': 12}"
    label = f"{{name: label, dtype: {{class_label: {{{names}}}}}}}"
    (tmp_path / "data/README.md").write_text(
        f"---\ndataset_info: {{features: [{{name: image, dtype: image}}, {label}]}}\n---\n"
    )
    assert load(f"hub:{folder(tmp_path)}").class_names == ("10", "11", "12")
    write(folder(tmp_path), train=rows(6).cast_column("label", datasets.ClassLabel(names=["10", "11", "12"])))
    assert load(f"hub:{folder(tmp_path)}").class_names == ("10", "11", "12")


def test_splits_may_share_the_numbers_of_their_files(tmp_path: Path):
    parts = {f"{number:04}": rows(6, 10 * number) for number in range(1, 6)}
    test = {name: parts.pop(name) for name in ("0002", "0004")}
    write(folder(tmp_path) / "train", **parts)
    write(folder(tmp_path) / "test", **test)
    assert len(load(f"hub:{folder(tmp_path)}").train) == 18
    write(folder(tmp_path) / "test", **{"0003": rows(6, 90)})
    refused(folder(tmp_path), "train/0001.parquet .. train/0003.parquet .. missing")


def test_names_of_classes_are_not_names_of_splits(tmp_path: Path):
    for i in range(15):
        path = folder(tmp_path) / ("Dev Patel", "Tom Hanks", "Val Kilmer")[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    assert load(f"hub:{folder(tmp_path)}").num_classes == 3
    (folder(tmp_path) / "Val Kilmer").rename(folder(tmp_path) / "Val")
    refused(folder(tmp_path), "Val/11.png .. 'train' .. lower case")


@pytest.mark.parametrize(
    ("train", "val", "test", "message"),
    [
        ("ant bee cat", "Ant bee cat", "", "train lacks the class 'Ant' .. val"),
        ("ant bee cat", "Ant bee", "ant bee cat", "train lacks the class 'Ant' .. val"),
        ("ant bee cat", "", "unknown", "train lacks the class 'unknown' .. test"),
        ("ant bee cat", "ant bee", "", None),
        ("ant bee cat", "ant bee", "ant bee cat", None),
    ],
)
def test_splits_have_folders_of_the_same_classes(train: str, val: str, test: str, message: str | None, tmp_path: Path):
    root = folder(tmp_path)
    for number, (split, names) in enumerate({"train": train, "val": val, "test": test}.items()):
        for i, name in enumerate(names.split()):
            (root / split / name).mkdir(parents=True)
            picture(10 * number + i).save(root / split / name / "0.png")
    if message:
        refused(root, message.replace("val", "validation"))
    else:
        assert load(f"hub:{root}").class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("names", "message", "warning"),
    [
        ("a/train a/test b/train b/test", "a and b .. test and train .. hub:{}/b .. README.md", None),
        ("train test a/train a/test", "folder itself and a .. hub:{}/a", None),
        ("a/train-0-of-1 a/test-0-of-1 b/train-0-of-1 b/test-0-of-1", "a and b .. hub:{}/b", None),
        ("a/train/0 a/test/0 b/train/0 b/test/0", "a and b .. hub:{}/b", None),
        ("a/0 b/0", None, "'train' joins the files of a, b; .. hub:{}/b"),
        ("train a/train test", None, "'train' joins the files of the folder itself, a; .. hub:{}/a"),
        ("train/a/0 train/b/0 test/a/0", None, ""),
        ("a/train b/test", None, ""),
    ],
)
def test_folders_that_look_like_data_sets_are_not_joined(
    names: str, message: str | None, warning: str | None, tmp_path: Path, capfd: pytest.CaptureFixture
):
    root = folder(tmp_path)
    for number, name in enumerate(names.split()):
        write((root / name).parent, **{Path(name).name: rows(6, 10 * number)})
    if message:
        refused(root, message.format(root))
        files = ", ".join(f"{{split: {split}, path: '**/*{split}*'}}" for split in ("train", "test"))
        declare(root, files if "/0" not in names else files.replace("'**/*", "'*/").replace("*'", "/*'"))
    load(f"hub:{root}")
    said = capfd.readouterr().err
    assert holds(said, warning.format(root)) if warning else "joins" not in said


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        ("train train_all", "'train' joins train.parquet, train_all.parquet"),
        ("train/0 train_small/0", "'train' joins train, train_small"),
        ("train-extra train", "'train' joins train-extra.parquet, train.parquet"),
        ("train/0 val/0 valid/0", "'validation' joins val, valid"),
        ("data/train-v1-0-of-1 data/train-v2-0-of-1", "train-v1-0-of-1.parquet, train-v2-0-of-1.parquet"),
        ("data/train-0-of-2-a09b74b3ef9c3b56 data/train-1-of-2-0123456789abcdef", None),
        ("train-2023 train-2024", None),
        ("train_part1 train_part2", None),
        ("train/part-0-3f2a1b-c000.snappy train/part-1-3f2a1b-c000.snappy", None),
    ],
)
def test_files_of_other_names_in_a_split_are_said(
    names: str, joined: str | None, tmp_path: Path, capfd: pytest.CaptureFixture
):
    test = re.sub("train[^/]*", "test", names.split()[0])
    for number, name in enumerate((*names.split(), test)):
        write((folder(tmp_path) / name).parent, **{Path(name).name: rows(6, 10 * number)})
    load(f"hub:{folder(tmp_path)}")
    said = capfd.readouterr().err
    assert holds(said, joined) if joined else "joins" not in said


def test_a_pattern_of_the_card_joins_no_other_split(tmp_path: Path):
    write(folder(tmp_path) / "data", **{"train-0": rows(12), "train_test-0": rows(6, 50), "test-0": rows(6, 100)})
    declare(folder(tmp_path), "{split: train, path: data/train*}, {split: test, path: data/test*}")
    refused(folder(tmp_path), "train_test-0.parquet .. 'train' .. two splits")
    declare(folder(tmp_path), "{split: train, path: data/train_test*}, {split: test, path: data/test*}")
    assert len(load(f"hub:{folder(tmp_path)}").train) == 6


@pytest.mark.parametrize("name", ["trainset testset", "data cache-1a2b"])
def test_files_that_are_no_part_of_train_are_refused(name: str, tmp_path: Path):
    first, second = (folder(tmp_path) / f"{part}.arrow" for part in name.split())
    for path, part in ((first, rows(30)), (second, rows(6, 100))):
        part.save_to_disk(tmp_path / "saved" / path.stem)
        shutil.copy(tmp_path / "saved" / path.stem / "data-00000-of-00001.arrow", path)
    refused(folder(tmp_path), f"{second.name} would be")
