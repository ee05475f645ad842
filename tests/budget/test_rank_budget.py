"""The cost of a model with matrices in factors: counted against real compact layers, and read back from files."""

import json

import pytest
import torch
from torch import Tensor, nn

from str_triton import LowRankLinear, LowRankWeight, MatrixBudget, RankBudget, count_ranks, sparsify
from tests.messages import holding

ROWS = [
    MatrixBudget("layer.weight_hh_l0, with a comma", 1536, 512, 512, 32, 0.1, True),
    MatrixBudget("", 3, 2, 1, 0, 1 / 3, False),
    MatrixBudget("compact", 100, 100, 4, 4, None, False),
    MatrixBudget("full", 10, 10, 10, 10, 1e-5, True),
]


@pytest.fixture
def budget() -> RankBudget:
    return RankBudget(list(ROWS), 1234, 1000)


def write(path, kind, budget):
    getattr(budget, f"to_{kind}")(path)
    return path


def read(path, kind):
    return getattr(RankBudget, f"from_{kind}")(path)


class Recurrent(nn.Module):
    """A layer of the protocol, one of whose recurrent matrices is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.zeros(8, 3))
        self.weight_hh_l0 = nn.Parameter(torch.zeros(8, 8))
        self.weight_hh_l0_reverse = LowRankWeight(8, 8, recurrent=True)
        self.bias_hh_l0 = nn.Parameter(torch.zeros(8))

    def factors(self) -> dict[str, LowRankWeight]:
        return {"weight_hh_l0_reverse": self.weight_hh_l0_reverse}

    def ranks(self) -> dict[str, int]:
        return {name: factor.rank for name, factor in self.factors().items()}

    def compact(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x


def cut(matrix, rank):
    """Leave this many components."""
    offsets = matrix.pruning_offsets().sort(descending=True).values
    matrix.raw_threshold.data.add_((offsets[rank - 1] + offsets[rank]) / 2)


def test_rows_and_totals():
    assert [row.params for row in ROWS] == [32 * 2048, 5, 800, 100]
    assert [row.dense_params for row in ROWS] == [1536 * 512, 6, 10_000, 100]
    budget = RankBudget(ROWS, 1234, 1000)
    assert budget.total_rank == 46
    assert budget.params == 32 * 2048 + 5 + 800 + 100 + 1234
    assert budget.dense_params == 1536 * 512 + 6 + 10_000 + 100 + 1234
    assert budget.recurrent_flops == 32 * 2048 + 100 + 1000
    assert budget.dense_recurrent_flops == 1536 * 512 + 100 + 1000
    assert budget.compression == budget.dense_params / budget.params
    assert RankBudget([]).compression == 1.0


def test_the_whole_model_is_counted_and_equals_the_compact_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 9), LowRankLinear(9, 12, recurrent=True), nn.LayerNorm(12), LowRankLinear(12, 30, max_rank=8)
    ).append(nn.Linear(30, 3))
    cut(model[1].weight, 2)
    budget = count_ranks(model)
    others = 7 * 9 + 12 + 2 * 12 + 30 + 30 * 3 + 3
    assert [row.name for row in budget.rows] == ["1.weight", "3.weight"]
    assert budget.rows[0] == MatrixBudget("1.weight", 12, 9, 9, 2, model[1].weight.threshold.item(), True)
    assert (budget.rows[1].rank, budget.rows[1].max_rank, budget.rows[1].recurrent) == (8, 8, False)
    assert budget.other_params == others
    assert budget.params == others + 2 * 21 + 8 * 42
    assert budget.dense_params == others + 108 + 360
    assert (budget.recurrent_flops, budget.dense_recurrent_flops) == (42, 108)
    model[1], model[3] = model[1].compact(), model[3].compact()
    compact = count_ranks(model)
    assert compact.params == budget.params == sum(parameter.numel() for parameter in model.parameters())
    assert compact.dense_params == budget.dense_params
    assert compact.recurrent_flops == 42
    assert [row.threshold for row in compact.rows] == [None, None]


def test_a_matrix_at_full_rank_counts_as_dense_and_an_empty_one_as_one_component():
    model = nn.Sequential(LowRankLinear(8, 8, bias=False), LowRankLinear(8, 8, bias=False))
    model[1].weight.raw_threshold.data.fill_(20.0)
    budget = count_ranks(model)
    assert [row.rank for row in budget.rows] == [8, 0]
    assert [row.params for row in budget.rows] == [64, 16]
    assert budget.params == sum(p.numel() for layer in model for p in layer.compact().parameters())


def test_shared_parameters_count_once():
    layer, head = LowRankLinear(6, 6), nn.Linear(6, 5)
    embedding = nn.Embedding(5, 6)
    embedding.weight = head.weight
    model = nn.ModuleDict({"a": layer, "b": layer, "c": head, "d": head, "e": embedding})
    budget = count_ranks(model)
    assert [row.name for row in budget.rows] == ["a.weight"]
    assert budget.params == budget.dense_params == 36 + 6 + 30 + 5


def test_thresholds_are_no_parameters():
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 3, 2)), granularity="filter")
    budget = count_ranks(model.append(LowRankLinear(4, 4)))
    assert budget.params == 16 + 4 + 24 + 3 + 16 + 4


@pytest.mark.parametrize(
    ("layer", "recurrent"),
    [
        (nn.GRU(5, 4, num_layers=2, bidirectional=True), 4 * 3 * 4 * 4),
        (nn.LSTM(5, 4), 4 * 4 * 4),
        (nn.LSTM(5, 4, proj_size=2), 4 * 4 * 2 + 2 * 4),
        (nn.RNN(5, 4), 16),
        (nn.LSTMCell(5, 4), 64),
        (nn.Linear(5, 4), 0),
        (Recurrent(), 64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dense_recurrent_matrices(layer, recurrent):
    budget = count_ranks(nn.Sequential(layer))
    assert budget.other_recurrent_flops == recurrent
    factored = sum(row.params for row in budget.rows)
    assert budget.recurrent_flops == budget.dense_recurrent_flops == recurrent + factored
    if not budget.rows:
        assert budget.params == budget.other_params == sum(parameter.numel() for parameter in layer.parameters())


def test_a_bare_matrix_and_a_model_without_any():
    budget = count_ranks(LowRankWeight(5, 4))
    assert (budget.rows[0].name, budget.params) == ("", 20)
    assert "(model)" in str(budget)
    budget = count_ranks(nn.ReLU())
    assert (budget.rows, budget.params, budget.total_rank) == ([], 0, 0)


def test_counting_changes_nothing():
    model = nn.Sequential(LowRankLinear(4, 4), nn.GRU(4, 4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_ranks(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_table_is_aligned_and_cuts_no_name(budget):
    text = str(budget)
    header, rule, first, bare, compact, _, recurrent, others, _, total = text.splitlines()
    assert {len(line) for line in text.splitlines()} == {len(header)}
    assert set(rule) == {"-"}
    assert first.startswith(ROWS[0].name + "  ")
    assert first.split()[-9:] == ["1,536", "512", "512", "32", "65,536", "786,432", "0.1", "65,536", "786,432"]
    assert bare.split() == ["(model)", "3", "2", "1", "0", "5", "6", "0.3333"]
    assert compact.split() == ["compact", "100", "100", "4", "4", "800", "10,000"]
    assert recurrent.split()[3:] == ["1,000"] * 4
    assert others.split() == ["(other", "parameters)", "234", "234"]
    assert total.split() == ["total", "527", "46", "67,675", "797,772", "66,636", "787,532"]
    assert "(other recurrent matrices)" not in str(RankBudget(ROWS, 1234))


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("rows", [ROWS, []])
@pytest.mark.parametrize("rest", [(1234, 1000), (7, 0), (0, 0)])
def test_files_round_trip_exactly(tmp_path, kind, rows, rest):
    path = write(tmp_path / "ranks", kind, RankBudget(rows, *rest))
    assert read(path, kind) == RankBudget(rows, *rest)
    assert [p.name for p in tmp_path.iterdir()] == ["ranks"]


def test_csv_has_the_columns_in_order_and_json_the_totals(tmp_path, budget):
    lines = write(tmp_path / "b.csv", "csv", budget).read_text().splitlines()
    assert lines[0] == "name,rows,columns,max_rank,rank,params,dense_params,threshold,recurrent"
    assert lines[-2:] == [
        "(other recurrent matrices),,,,,1000,1000,,True",
        "(other parameters),,,,,234,234,,False",
    ]
    content = json.loads(write(tmp_path / "b.json", "json", budget).read_text())
    for key in ("total_rank", "params", "dense_params", "compression", "recurrent_flops", "dense_recurrent_flops"):
        assert content[key] == getattr(budget, key)
    assert content["rows"][2]["threshold"] is None
    assert content["rows"][0]["recurrent"] is True


def test_csv_that_a_spreadsheet_wrote_again_is_read(tmp_path, budget):
    path = write(tmp_path / "b.csv", "csv", budget)
    text = path.read_text().replace("True", "TRUE").replace("False", "FALSE")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read(path, "csv") == budget


COLUMNS = ["name", "rows", "columns", "max_rank", "rank", "params", "dense_params", "threshold", "recurrent"]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_missing_column_is_named(tmp_path, budget, kind, column):
    path = write(tmp_path / "ranks", kind, budget)
    if kind == "csv":
        heading, rest = path.read_text().split("\n", 1)
        path.write_text(",".join("other" if name == column else name for name in heading.split(",")) + "\n" + rest)
    else:
        content = json.loads(path.read_text())
        del content["rows"][1][column]
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"ranks.*no column '{column}'"):
        read(path, kind)


@pytest.mark.parametrize(
    "key",
    [
        *("total_rank", "params", "dense_params", "compression", "recurrent_flops", "dense_recurrent_flops"),
        *("other_params", "other_recurrent_flops", "rows"),
    ],
)
def test_json_total_that_is_missing_or_wrong_is_named(tmp_path, budget, key):
    path = write(tmp_path / "b.json", "json", budget)
    content = json.loads(path.read_text())
    for value in (None, -7, "x"):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=rf"b\.json, column '{key}'"):
            read(path, "json")
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"b\.json: no column '{key}'"):
        read(path, "json")


def test_json_with_more_recurrent_than_other_parameters_is_refused(tmp_path):
    write(path := tmp_path / "b.json", "json", RankBudget([], 3, 4))
    with pytest.raises(ValueError, match=r"b\.json.* 'other_recurrent_flops': 4.* other_params .*3"):
        read(path, "json")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("rows", "many"), ("rows", 0), ("columns", 2.5), ("max_rank", True), ("max_rank", ""), ("rank", -1)],
        *[("rank", 9), ("params", 35), ("params", None), ("dense_params", 143), ("threshold", "low")],
        *[("recurrent", 1), ("recurrent", ""), ("recurrent", "maybe")],
    ],
)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_damaged_value_names_file_row_and_column(tmp_path, kind, column, value):
    row = MatrixBudget("w", 12, 8, 8, 2, 0.5, True)
    path = write(tmp_path / "ranks", kind, RankBudget([row, row], 3))
    if kind == "csv":
        lines = path.read_text().splitlines()
        cells = dict(zip(lines[0].split(","), lines[2].split(","), strict=True)) | {column: value}
        lines[2] = ",".join("" if cell is None else str(cell) for cell in cells.values())
        path.write_text("\n".join(lines) + "\n")
    else:
        content = json.loads(path.read_text())
        content["rows"][1][column] = value
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"ranks, row 2, column '{column}'"):
        read(path, kind)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_file_cut_at_any_byte_is_refused(tmp_path, budget, kind):
    path = write(tmp_path / "ranks", kind, budget)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data[:-1]) if byte == ord("\n")]
    for end in [*range(0, len(data) - 1, 7), *ends]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="ranks"):
            read(path, kind)


def test_other_lines_of_a_csv_are_checked(tmp_path, budget):
    path = write(tmp_path / "b.csv", "csv", budget)
    path.write_text(path.read_text().replace("(other parameters),,,,,234", "(other parameters),,,,,-1"))
    with pytest.raises(ValueError, match=holding("b.csv .. row 6 .. 'params' .. -1")):
        read(path, "csv")
