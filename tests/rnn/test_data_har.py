"""UCI HAR: folders and zip files with random data in its format."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.rnn.data import Data, load
from str_triton.rnn.data.har import SIGNALS
from str_triton.training.fingerprint import Fingerprint
from tests.messages import holding, holds

SUBJECTS = {"train": [1, 3, 5, 6, 7, 8, 11, 14, 15, 16, 17], "test": [2, 4]}
Files = dict[str, str]


def raw(part: str) -> np.ndarray:
    """Draw a window of each activity and subject, float64 [N, 128, 9]."""
    count = len(SUBJECTS[part]) * 6
    signals = np.random.default_rng(len(part)).normal(size=(count, 128, 9))
    return np.round(signals * np.arange(1, 10) + np.arange(9), 4)


@pytest.fixture(scope="module")
def published() -> Files:
    """Return the files by path in the published format: a line begins with blanks, numbers have exponents."""
    files = {"README.txt": "made up"}
    for part, people in SUBJECTS.items():
        windows = raw(part)
        files[f"{part}/y_{part}.txt"] = "".join(f"{row % 6 + 1}\n" for row in range(len(windows)))
        files[f"{part}/subject_{part}.txt"] = "".join(f"{people[row // 6]}\n" for row in range(len(windows)))
        for column, signal in enumerate(SIGNALS):
            lines = ["".join(f" {value: .7e}" for value in row) + "\n" for row in windows[:, :, column]]
            files[f"{part}/Inertial Signals/{signal}_{part}.txt"] = "".join(lines)
    return files


def write_folder(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def zipped(files: dict[str, str | bytes], prefix: str = "") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(prefix + name, text)
    return content.getvalue()


@pytest.fixture(scope="module")
def folder(published: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("har") / "UCI HAR Dataset", published)


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return load(f"har:{folder}", noise=0.1)


def everything(data: Data) -> list[torch.Tensor]:
    return [tensor for part in (data.train, data.validation, data.test) for tensor in (part.features, part.labels)]


def test_parts_are_split_by_subject(data: Data):
    assert (data.name, data.task, data.input_size, data.num_classes) == ("har", "classify", 9, 6)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9 * 6, 2 * 6, 2 * 6]
    assert data.notes["validation"] == "training subjects 7, 16"
    assert data.class_names[data.train.labels[1]] == "walking upstairs"
    assert data.train.labels[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]


def test_features_are_the_nine_signals_standardised_by_the_training_subjects(data: Data):
    windows = raw("train")
    held_out = np.isin(np.repeat(SUBJECTS["train"], 6), [7, 16])
    mean, std = (getattr(windows[~held_out], name)((0, 1)) for name in ("mean", "std"))
    for part, expected in (
        (data.train, windows[~held_out]),
        (data.validation, windows[held_out]),
        (data.test, raw("test")),
    ):
        assert part.features.dtype == torch.float32
        torch.testing.assert_close(part.features, torch.from_numpy((expected - mean) / std).float())
    assert SIGNALS[0] == "total_acc_x"
    assert SIGNALS[8] == "body_gyro_z"


def test_a_batch_needs_no_lengths_and_noise_is_for_training(data: Data):
    generator = torch.Generator().manual_seed(0)
    x, lengths, labels = data.train.batch(torch.tensor([3, 1]), augment=False, generator=generator, device="cpu")
    assert (x.shape, lengths, labels.tolist()) == ((2, 128, 9), None, [3, 1])
    noisy, _, _ = data.train.batch(torch.tensor([3, 1]), augment=True, generator=generator, device="cpu")
    assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.1)


def test_another_window_is_other_data(folder: Path, data: Data, published: Files, tmp_path: Path):
    name = f"test/Inertial Signals/{SIGNALS[4]}_test.txt"
    lines = published[name].splitlines(keepends=True)
    other = load(f"har:{write_folder(tmp_path, published | {name: ''.join([lines[6], *lines[1:]])})}")
    began, same, now = (
        Fingerprint.of(part.labels, part.stored) for part in (data.test, load(f"har:{folder}").test, other.test)
    )
    assert began.change(same, "test") is None
    assert holds(began.change(now, "test"), "in 1 of 12 sampled test examples")


def test_two_classes_are_those_of_the_paper(folder: Path, data: Data):
    two = load(f"har:{folder}", classes=2)
    assert two.class_names == ("sitting, laying, walking upstairs", "standing, walking, walking downstairs")
    # Labels 1 ... 6: walking, upstairs, downstairs, sitting, standing, laying.
    assert torch.equal(two.test.labels, torch.tensor([1, 0, 1, 0, 1, 0])[data.test.labels])
    assert torch.equal(two.train.features, data.train.features)


@pytest.mark.parametrize("form", ["outer folder", "zip", "zip without a folder", "zip in a zip"])
def test_every_published_form_gives_the_same(form: str, folder: Path, published: Files, data: Data, tmp_path: Path):
    path = tmp_path / "har.zip"
    if form == "outer folder":
        path = folder.parent
    elif form == "zip without a folder":
        path.write_bytes(zipped(published))
    else:
        content = zipped(published, "UCI HAR Dataset/")
        path.write_bytes(content if form == "zip" else zipped({"UCI HAR Dataset.zip": content}))
    for got, expected in zip(everything(load(f"har:{path}")), everything(data), strict=True):
        assert torch.equal(got, expected)


def in_first_line(old: str, new: str) -> Callable[[str], str]:
    return lambda content: content.replace(old, new, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test/y_test.txt", None, r"test/y_test\.txt: missing$"),
        ("train/Inertial Signals/body_acc_y_train.txt", None, r"Inertial Signals/body_acc_y_train\.txt: missing$"),
        ("train/y_train.txt", lambda content: "", r"y_train\.txt: empty$"),
        ("train/y_train.txt", in_first_line("3", "7"), r"y_train\.txt: label 7 .*row 3.* 1 to 6"),
        ("train/y_train.txt", in_first_line("3", "2.5"), r"y_train\.txt: label 2\.5 .*row 3.* 1 to 6"),
        ("train/y_train.txt", in_first_line("1\n", ""), r"subject_train\.txt.* 66 rows.*y_train\.txt.* 65"),
        (
            "test/Inertial Signals/body_gyro_z_test.txt",
            lambda content: content[content.index("\n") + 1 :],
            r"body_gyro_z_test\.txt.* 11 rows.*y_test\.txt.* 12",
        ),
        (
            "train/Inertial Signals/total_acc_x_train.txt",
            lambda content: "".join(line.rsplit(" ", 1)[0] + "\n" for line in content.splitlines()),
            r"total_acc_x_train\.txt.* 127 numbers.* 128",
        ),
        (
            "train/Inertial Signals/total_acc_x_train.txt",
            lambda content: content.replace("e+00 ", "e+00 \n", 1),
            r"total_acc_x_train\.txt.*columns changed from .*[0-9]",
        ),
        (
            "train/Inertial Signals/total_acc_x_train.txt",
            in_first_line("e+00", "abc"),
            r"total_acc_x_train\.txt.*abc",
        ),
        (
            "train/Inertial Signals/total_acc_z_train.txt",
            lambda content: content[: content.rindex("\n", 0, -1)] + "\n" + "NaN " * 128 + "\n",
            r"total_acc_z_train\.txt.*NaN.* column 1, row 66",
        ),
        (
            "test/Inertial Signals/total_acc_z_test.txt",
            lambda content: "-inf " * 128 + content[content.index("\n") :],
            r"total_acc_z_test\.txt.*infinite.* column 1, row 1",
        ),
        (
            "test/Inertial Signals/total_acc_z_test.txt",
            lambda content: "1 " * 127 + "1e300" + content[content.index("\n") :],
            r"total_acc_z_test\.txt.*1e\+300.*float32.* column 128, row 1",
        ),
        ("test/subject_test.txt", in_first_line("2", "2.5"), r"subject_test\.txt.*subject 2\.5 .*row 1"),
        ("test/subject_test.txt", lambda content: "\0" + content, r"subject_test\.txt: .*numbers"),
        (
            "train/subject_train.txt",
            lambda content: "1\n" * 66,
            "1 subjects.* at least 5",
        ),
    ],
)
def test_bad_files_are_named(name: str, change, message: str, published: Files, tmp_path: Path):
    files = dict(published)
    content = files.pop(name)
    if change is not None:
        files[name] = change(content)
    folder = write_folder(tmp_path / "UCI HAR Dataset", files)
    for spec in (f"har:{folder}", f"har:{tmp_path / 'har.zip'}"):
        (tmp_path / "har.zip").write_bytes(zipped(files, "UCI HAR Dataset/"))
        with pytest.raises(ValueError, match=message) as caught:
            load(spec)
        assert "\n" not in str(caught.value)


def test_bad_places_are_named(published: Files, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^har:.*nowhere: no such folder"):
        load(f"har:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match='no "UCI HAR Dataset"'):
        load(f"har:{tmp_path}")
    (tmp_path / "train" / "Inertial Signals").mkdir(parents=True)
    with pytest.raises(ValueError, match=holding(f"one part .. {tmp_path}")):
        load(f"har:{tmp_path / 'train'}")
    with pytest.raises(ValueError, match=f"har:{tmp_path}$"):
        load(str(tmp_path))
    (tmp_path / "empty.zip").write_bytes(zipped({"readme": "x"}))
    with pytest.raises(ValueError, match='no "UCI HAR Dataset"'):
        load(f"har:{tmp_path / 'empty.zip'}")
    whole = zipped(published, "UCI HAR Dataset/")
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.zip: .*zip file"):
        load(f"har:{tmp_path / 'half.zip'}")
    (tmp_path / "outer.zip").write_bytes(zipped({"UCI HAR Dataset.zip": whole[: len(whole) // 2]}))
    with pytest.raises(ValueError, match=r"outer\.zip/UCI HAR Dataset\.zip: "):
        load(f"har:{tmp_path / 'outer.zip'}")


def test_a_damaged_member_is_named(published: Files, tmp_path: Path):
    content = bytearray(zipped(published, "UCI HAR Dataset/"))
    place = content.index(b"body_acc_x_train.txt") + 1000
    content[place : place + 100] = bytes(100)
    (tmp_path / "har.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"body_acc_x_train\.txt: damaged"):
        load(f"har:{tmp_path / 'har.zip'}")


MEMBER = "UCI HAR Dataset/train/y_train.txt"


def with_header(content: bytes, offset: int, value: int) -> bytes:
    """Change two bytes in the header of MEMBER, and in its entry in the archive's directory, two bytes later."""
    changed = bytearray(content)
    for begin in (b"PK\3\4", b"PK\1\2"):
        name = changed.index(MEMBER.encode(), changed.index(begin))
        place = changed.rindex(begin, 0, name) + offset + (2 if begin == b"PK\1\2" else 0)
        changed[place : place + 2] = value.to_bytes(2, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (6, 1, r"y_train\.txt: encrypted"),
        (8, 99, r"y_train\.txt: .*unpack"),
        (8, 12, r"y_train\.txt: damaged"),
        (8, 14, r"y_train\.txt: damaged"),
    ],
)
def test_archives_of_another_kind_are_named(
    offset: int, value: int, message: str, published: Files, folder: Path, tmp_path: Path
):
    (tmp_path / "har.zip").write_bytes(with_header(zipped(published, "UCI HAR Dataset/"), offset, value))
    with pytest.raises(ValueError, match=message):
        load(f"har:{tmp_path / 'har.zip'}")


@pytest.mark.parametrize("name", ["UCI HAR Dataset/test/Inertial Signals/total_acc_x_test.txt", "UCI HAR Dataset.zip"])
def test_an_archive_that_blows_up_is_refused(
    name: str, published: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("str_triton.rnn.data.har.LARGEST", 2**20)
    files = {f"UCI HAR Dataset/{path}": text for path, text in published.items()} if "/" in name else {}
    (tmp_path / "har.zip").write_bytes(zipped({**files, name: b"0 " * 2**20}))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        load(f"har:{tmp_path / 'har.zip'}")


def test_names_that_lead_out_of_an_archive_write_nothing(published: Files, data: Data, tmp_path: Path):
    files = {f"UCI HAR Dataset/{path}": text for path, text in published.items()}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "har.zip").write_bytes(zipped({"../evil.txt": "x", "/evil.txt": "x", **files}))
    assert torch.equal(load(f"har:{tmp_path / 'in' / 'har.zip'}").test.features, data.test.features)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_other_numbers_of_classes_are_refused(folder: Path):
    with pytest.raises(ValueError, match=r"har .* 6 .* 2, not 3"):
        load(f"har:{folder}", classes=3)
