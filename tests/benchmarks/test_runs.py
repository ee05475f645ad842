import pytest

from benchmarks.runs import RunFile
from benchmarks.studies import exact_budgets, exact_budgets_screen, learned_rank, learned_rank_screen, methods
from benchmarks.tables.documents import RESULTS


@pytest.fixture
def file(tmp_path):
    return RunFile(tmp_path / "results" / "study.jsonl", ("method", "target"))


def test_runs_are_read_in_the_order_in_which_they_were_appended(file):
    assert file.read() == []
    runs = [{"method": "b", "target": 0.9, "density": [0.1, 1]}, {"method": "a", "target": None, "seconds": 1.5}]
    for run in runs:
        file.append(run)
    assert file.read() == runs
    assert file.path.read_text().count("\n") == 2


def test_a_run_without_a_field_of_the_key_is_not_written(file):
    with pytest.raises(KeyError, match="target"):
        file.append({"method": "a"})
    assert not file.path.exists()


def test_runs_that_the_file_holds_are_skipped_and_none_is_done_twice(file):
    a, b, c = ({"method": name, "target": 0.1 + 0.2} for name in "abc")
    file.append(b | {"accuracy": 0.5})
    assert list(file.missing([a, b, c, a])) == [a, c]
    left = file.missing([a, b, c])
    assert next(left) == a
    file.append(c)  # another process
    assert list(left) == []


@pytest.mark.parametrize("cut", ['{"method": "b", "tar', '{"method": "b", "target": 1}', "{"])
def test_a_line_that_a_kill_cut_short_is_done_again(file, cut):
    a, b = {"method": "a", "target": 1, "text": "é"}, {"method": "b", "target": 1}
    file.append(a)
    with file.path.open("a") as stream:
        stream.write(cut)
    assert file.read() == [a]
    assert list(file.missing([a, b])) == [b]
    file.append(b)
    assert file.read() == [a, b]


@pytest.mark.parametrize(
    ("held", "number"),
    [
        (exact_budgets.RUNS, 40),
        (exact_budgets_screen.RUNS, 40),
        (learned_rank.RUNS, 40),
        (learned_rank.TUNING, 40),
        (learned_rank_screen.RUNS, 40),
        (methods.RUNS, 40),
        (methods.TRIALS, 5),
    ],
    ids=lambda value: value.path.stem if isinstance(value, RunFile) else "",
)
def test_each_studys_key_is_in_each_line_of_its_results(held, number):
    runs = held.read()
    assert held.path.parent == RESULTS
    assert len(runs) > number
    assert next(held.missing(runs), None) is None
