import json
import re

import pytest

from str_triton.budget.budget import Budget, LayerBudget

ROWS = [
    LayerBudget("features.0.a_rather_long_name, with a comma", 1_000_000, 100_001, 64_000_000, 6_400_064, 0.1),
    LayerBudget("", 3, 2, 0, 0, None),
    LayerBudget("(average pools)", 0, 0, 50_176, 50_176),
    LayerBudget("head", 10**15, 1, 10**18 + 1, 1, 1 / 3),
]


@pytest.fixture
def budget() -> Budget:
    return Budget(list(ROWS))


def write(path, kind: str, budget: Budget):
    getattr(budget, f"to_{kind}")(path)
    return path


def read(path, kind: str) -> Budget:
    return getattr(Budget, f"from_{kind}")(path)


def test_totals_are_sums_and_sparsity_is_the_share_of_zeros(budget):
    assert budget.params == 1_000_003 + 10**15
    assert budget.nonzeros == 100_004
    assert budget.dense_flops == 64_050_176 + 10**18 + 1
    assert budget.flops == 6_450_241
    assert budget.sparsity == 1 - 100_004 / (1_000_003 + 10**15)
    assert budget.rows[0].sparsity == 1 - 100_001 / 1_000_000
    assert budget.rows[2].sparsity == Budget([]).sparsity == 0.0


def test_table_is_aligned_and_cuts_no_name():
    text = str(Budget(ROWS[:3]))
    header, rule, first, bare, pools, _, total = text.splitlines()
    assert {len(line) for line in text.splitlines()} == {len(header)}
    assert set(rule) == {"-"}
    assert header.split() == ["layer", "weights", "nonzeros", "sparsity", "dense", "FLOPs", "FLOPs", "threshold"]
    assert first.startswith(ROWS[0].name + "  ")
    assert first.split()[-7:] == ["1,000,000", "100,001", "90.00", "%", "64,000,000", "6,400,064", "0.1"]
    assert bare.split() == ["(model)", "3", "2", "33.33", "%", "0", "0"]
    assert pools.split() == ["(average", "pools)", "0", "0", "50,176", "50,176"]
    assert total.split() == ["total", "1,000,003", "100,003", "90.00", "%", "64,050,176", "6,450,240"]


MIXED = [*ROWS[:3], LayerBudget("experts", 3_000_000, 2_000_000, 100, 50, None, covered=False)]


def test_totals_are_of_the_covered_weights_and_flops_of_all():
    budget = Budget(MIXED)
    assert (budget.params, budget.nonzeros) == (1_000_003, 100_003)
    assert (budget.uncovered_params, budget.uncovered_nonzeros) == (3_000_000, 2_000_000)
    assert budget.sparsity == Budget(ROWS[:3]).sparsity
    assert budget.total_sparsity == 1 - 2_100_003 / 4_000_003
    assert (budget.dense_flops, budget.flops) == (64_050_276, 6_450_290)
    assert [row.name for row in budget.covered_rows] == [ROWS[0].name, ""]
    assert budget.uncovered_rows == MIXED[3:]
    assert Budget(ROWS).total_sparsity == Budget(ROWS).sparsity


def test_table_marks_what_is_not_covered_and_gives_both_sparsities():
    *_, experts, rule, covered, total, remark = str(Budget(MIXED)).splitlines()
    assert experts.startswith("experts (not covered) ")
    assert set(rule) == {"-"}
    assert covered.split()[-6:] == ["1,000,003", "100,003", "90.00", "%", "64,050,176", "6,450,240"]
    assert total.split()[-6:] == ["4,000,003", "2,100,003", "47.50", "%", "64,050,276", "6,450,290"]
    for text in ("not covered: 1 matrix, 75.00 % of all weights", "90.00 %", "47.50 % of all"):
        assert text in remark


def test_no_layer_with_weights_left_is_printed_as_empty_nor_one_with_a_zero_as_dense():
    rows = [LayerBudget("a", 589_824, 29, 1, 1), LayerBudget("b", 589_824, 589_823, 1, 1), LayerBudget("c", 9, 0, 1, 0)]
    cells = [line[3] for line in Budget(rows).lines()[1:4]]
    assert cells == ["99.995 %", "0.0002 %", "100.00 %"]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_without_the_later_columns_and_totals_is_read(tmp_path, kind):
    path = write(tmp_path / "budget", kind, Budget(ROWS))
    if kind == "csv":
        path.write_text(re.sub(r",(covered|True)\n", "\n", path.read_text()))
    else:
        content = json.loads(path.read_text())
        for key in ("uncovered_params", "uncovered_nonzeros", "total_sparsity"):
            del content[key]
        for row in content["rows"]:
            del row["covered"]
        path.write_text(json.dumps(content))
    assert "covered" not in path.read_text()
    assert read(path, kind) == Budget(ROWS)


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("rows", [ROWS, MIXED, []])
def test_files_round_trip_exactly(tmp_path, kind, rows):
    path = write(tmp_path / "budget", kind, Budget(rows))
    assert read(path, kind) == Budget(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["budget"]


def test_csv_has_the_columns_in_order_and_json_the_totals(tmp_path, budget):
    first = write(tmp_path / "b.csv", "csv", budget).read_text().splitlines()[0]
    assert first == "name,params,nonzeros,sparsity,dense_flops,flops,threshold,covered"
    content = json.loads(write(tmp_path / "b.json", "json", budget).read_text())
    assert [content[key] for key in ("params", "flops", "sparsity")] == [budget.params, budget.flops, budget.sparsity]
    assert content["rows"][1]["threshold"] is None


def test_csv_that_a_spreadsheet_wrote_again_is_read(tmp_path, budget):
    path = write(tmp_path / "b.csv", "csv", Budget(ROWS[:1]))
    text = (
        path.read_text()
        .replace("0.899999,", "0.89999900000001,")
        .replace("True\n", "TRUE,a note\n")
        .replace("covered\n", "covered,notes\n")
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read(path, "csv") == Budget(ROWS[:1])


@pytest.mark.parametrize("column", ["name", "params", "nonzeros", "sparsity", "dense_flops", "flops", "threshold"])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_missing_column_is_named(tmp_path, budget, kind, column):
    path = write(tmp_path / "budget", kind, budget)
    if kind == "csv":
        path.write_text(re.sub(rf"\b{column}\b", "other", path.read_text(), count=1))
    else:
        content = json.loads(path.read_text())
        del content["rows"][1][column]
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"budget.*no column '{column}'"):
        read(path, kind)


@pytest.mark.parametrize("key", ["uncovered_params", "uncovered_nonzeros", "total_sparsity"])
def test_later_json_total_that_is_wrong_is_named(tmp_path, budget, key):
    path = write(tmp_path / "b.json", "json", budget)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 7}))
    with pytest.raises(ValueError, match=rf"b\.json, column '{key}'"):
        read(path, "json")


@pytest.mark.parametrize("key", ["params", "nonzeros", "sparsity", "dense_flops", "flops", "rows"])
def test_json_total_that_is_missing_or_wrong_is_named(tmp_path, budget, key):
    path = write(tmp_path / "b.json", "json", budget)
    content = json.loads(path.read_text())
    for value in (None, 7):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=rf"b\.json, column '{key}'"):
            read(path, "json")
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"b\.json: no column '{key}'"):
        read(path, "json")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("params", "many"),
        ("params", 2.5),
        ("params", True),
        ("nonzeros", None),
        ("nonzeros", -1),
        ("nonzeros", 11),
        ("flops", 101),
        ("dense_flops", ""),
        ("sparsity", 0.75),
        ("sparsity", "half"),
        ("threshold", "low"),
        ("covered", "partly"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_damaged_value_names_file_row_and_column(tmp_path, kind, column, value):
    row = LayerBudget("conv", 10, 5, 100, 50, 0.5)
    path = write(tmp_path / "budget", kind, Budget([row, row]))
    if kind == "csv":
        lines = path.read_text().splitlines()
        cells = dict(zip(lines[0].split(","), lines[2].split(","), strict=True)) | {column: value}
        path.write_text("\n".join([*lines[:2], ",".join(map(str, cells.values()))]) + "\n")
    else:
        content = json.loads(path.read_text())
        content["rows"][1][column] = value
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"budget, row 2, column '{column}'"):
        read(path, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: [row], "row 2: expected the columns name, "),
        (lambda row: row | {"name": 3}, "row 2, column 'name'.* 3"),
    ],
)
def test_damaged_row_of_json(tmp_path, change, message):
    row = LayerBudget("conv", 10, 5, 100, 50, 0.5)
    path = write(tmp_path / "budget", "json", Budget([row, row]))
    content = json.loads(path.read_text())
    content["rows"][1] = change(content["rows"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(path, "json")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_file_cut_at_any_byte_is_refused_or_read_whole_lines_only(tmp_path, budget, kind):
    path = write(tmp_path / "budget", kind, budget)
    data = path.read_bytes()
    for end in range(0, len(data) - 1, 5):
        path.write_bytes(data[:end])
        if kind == "csv" and data[:end].endswith(b"\n"):
            continue
        with pytest.raises(ValueError, match="budget"):
            read(path, kind)


def test_csv_with_a_damaged_quote_is_refused(tmp_path):
    path = write(tmp_path / "b.csv", "csv", Budget(ROWS[:1]))
    path.write_text(path.read_text().replace('a comma"', 'a"comma"'))
    with pytest.raises(ValueError, match=r"b\.csv: not a budget in CSV"):
        read(path, "csv")


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[]\n", b"null\n", b'{"rows": 3}\n', b'"\n', b"1,2,3\n\n"])
def test_file_of_another_kind_is_refused_by_name(tmp_path, kind, data):
    path = tmp_path / "budget"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="budget"):
        read(path, kind)


def test_csv_row_with_too_many_cells_is_refused(tmp_path, budget):
    path = write(tmp_path / "b.csv", "csv", budget)
    path.write_text(path.read_text() + "x,1,1,0.0,1,1,,True,stray\n")
    with pytest.raises(ValueError, match=r"b\.csv, row 5.*'stray'"):
        read(path, "csv")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, budget):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        budget.to_csv(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
