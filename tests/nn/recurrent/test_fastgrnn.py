"""LowRankFastGRNN compared with the formula of EdgeML's cell, and the conversion of EdgeML's parameters."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from str_triton import LowRankFastGRNN
from tests.messages import holding

INPUT, HIDDEN = 3, 5


def cell(x: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Compute one step of row vectors x [B, I] and h [B, H]."""
    w = p["W"] if "W" in p else p["W1"] @ p["W2"]
    u = p["U"] if "U" in p else p["U1"] @ p["U2"]
    pre = x @ w + h @ u
    z = torch.sigmoid(pre + p["bias_gate"])
    c = torch.tanh(pre + p["bias_update"])
    return z * h + (torch.sigmoid(p["zeta"]) * (1.0 - z) + torch.sigmoid(p["nu"])) * c


def literal(x: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Compute all steps: x [T, B, I] -> [T, B, H]."""
    outputs = []
    for step in x:
        h = cell(step, h, p)
        outputs.append(h)
    return torch.stack(outputs)


def parameters(input_rank: int | None, rank: int | None) -> dict[str, Tensor]:
    shapes = {"W": (INPUT, HIDDEN)} if input_rank is None else {"W1": (INPUT, input_rank), "W2": (input_rank, HIDDEN)}
    shapes |= {"U": (HIDDEN, HIDDEN)} if rank is None else {"U1": (HIDDEN, rank), "U2": (rank, HIDDEN)}
    shapes |= {"bias_gate": (1, HIDDEN), "bias_update": (1, HIDDEN), "zeta": (1, 1), "nu": (1, 1)}
    return {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}


def in_layout(p: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    return p if layout == "cell" else {key: value.mT if key[0] in "WU" else value for key, value in p.items()}


@pytest.mark.parametrize("layout", ["cell", "cuda"])
@pytest.mark.parametrize("input_rank", [None, 2])
@pytest.mark.parametrize("rank", [None, 2])
def test_from_edgeml_is_the_cell(input_rank: int | None, rank: int | None, layout: str) -> None:
    p = parameters(input_rank, rank)
    layer = LowRankFastGRNN.from_edgeml(in_layout(p, layout), layout=layout)
    x, h = torch.randn(7, 4, INPUT, dtype=torch.float64), torch.randn(4, HIDDEN, dtype=torch.float64)
    outputs, final = layer(x, h[None])
    expected = literal(x, h, p)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(final[0], expected[-1])
    assert layer.ranks() == {"weight_ih_l0": input_rank or INPUT, "weight_hh_l0": rank or HIDDEN}
    assert list(p) == list(parameters(input_rank, rank))


def test_from_edgeml_takes_arrays_and_options() -> None:
    p = {key: value.float().numpy() for key, value in parameters(None, None).items()}
    layer = LowRankFastGRNN.from_edgeml(p, max_rank=2, factorize="recurrent", raw_threshold_init=-3.0, batch_first=True)
    assert layer.ranks() == {"weight_hh_l0": 2}
    assert layer.weight_ih_l0.detach().numpy() == pytest.approx(p["W"].T)
    assert layer.weight_hh_l0.raw_threshold.item() == -3
    assert layer.batch_first
    p["U"] *= 0
    assert (layer.weight_hh_l0.weight() != 0).any()


def test_a_cell_of_more_components_than_its_matrix_has() -> None:
    p = parameters(INPUT + 2, HIDDEN + 3)
    layer = LowRankFastGRNN.from_edgeml(p)
    x = torch.randn(7, 4, INPUT, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], literal(x, x.new_zeros(4, HIDDEN), p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": (3, 5, 1)}, r"W .*2 dimensions.* \[3, 5, 1\]"),
        ({"U": (5, 4)}, r"U .*\[5, 5\].* \[5, 4\]"),
        ({"W": (3, 4)}, r"U .*\[4, 4\].* \[5, 5\]"),
        ({"U": None}, "U is missing.* bias_gate, bias_update, zeta, nu"),
        ({"U": None, "U1": (5, 2)}, "U2 is missing"),
        ({"U": None, "U1": (5, 2), "U2": (3, 5)}, r"U2 .*\[2, 5\].* \[3, 5\]"),
        ({"U": None, "U1": (5, 2), "U2": (2, 4)}, r"U2 .*\[2, 5\].* \[2, 4\]"),
        ({"U": None, "U1": (4, 2), "U2": (2, 5)}, r"U1 .*\[5, 2\].* \[4, 2\]"),
        ({"W": None, "W1": (3,), "W2": (2, 5)}, r"W1 .*2 dimensions.* \[3\]"),
        ({"bias_gate": (1, 4)}, r"bias_gate .*\[1, 5\].* \[1, 4\]"),
        ({"bias_update": None}, "bias_update is missing"),
        ({"zeta": (1, 2)}, r"zeta .*\[1, 1\].* \[1, 2\]"),
        ({"W1": (3, 2), "W2": (2, 5)}, "unknown parameters .*: W$"),
        ({"gain": (1,)}, "unknown parameters .*: gain$"),
    ],
)
def test_from_edgeml_names_the_key_that_does_not_fit(change: dict[str, tuple | None], message: str) -> None:
    p = parameters(None, None)
    for key, shape in change.items():
        p.pop(key, None)
        if shape is not None:
            p[key] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        LowRankFastGRNN.from_edgeml(p)


def test_from_edgeml_knows_two_layouts() -> None:
    with pytest.raises(ValueError, match=r"layout .*'cell' or 'cuda'.* 'row'"):
        LowRankFastGRNN.from_edgeml(parameters(None, None), layout="row")


def of_layer(layer: LowRankFastGRNN, suffix: str) -> dict[str, Tensor]:
    """Return EdgeML's parameters of one direction as functions of the layer's parameters."""
    w, u = (getattr(layer, f"weight_{name}_{suffix}") for name in ("ih", "hh"))
    matrices = {"W": w, "U": u}
    p = {key: (own if isinstance(own, Tensor) else own.weight()).mT for key, own in matrices.items()}
    zeros = w.new_zeros(1) if isinstance(w, Tensor) else w.u.new_zeros(1)
    for name in ("bias_gate", "bias_update", "zeta", "nu"):
        p[name] = getattr(layer, f"{name}_{suffix}", zeros)
    return p


@pytest.mark.parametrize("factorize", ["both", "recurrent", "none"])
def test_layers_and_directions_are_cells(factorize: str) -> None:
    for num_layers, bias, bidirectional in itertools.product([1, 2], [True, False], [True, False]):
        options = {"factorize": factorize, "raw_threshold_init": -3.0, "dtype": torch.float64}
        layer = LowRankFastGRNN(INPUT, HIDDEN, num_layers, bias, True, 0.0, bidirectional, **options)
        for parameter in layer.parameters():
            nn.init.normal_(parameter) if parameter.shape != (1,) else None
        x = torch.randn(4, 6, INPUT, dtype=torch.float64)
        h = torch.randn(num_layers * (1 + bidirectional), 4, HIDDEN, dtype=torch.float64)
        outputs, final = layer(x, h)
        steps, finals = x.transpose(0, 1), []
        for number in range(num_layers):
            parts = []
            for direction, suffix in enumerate(("", "_reverse")[: 1 + bidirectional]):
                p, h0 = of_layer(layer, f"l{number}{suffix}"), h[len(finals)]
                order = -1 if direction else 1
                part = literal(steps.flip(0) if direction else steps, h0, p)
                finals.append(part[-1])
                parts.append(part.flip(0) if order < 0 else part)
            steps = torch.cat(parts, dim=-1)
        torch.testing.assert_close(outputs, steps.transpose(0, 1))
        torch.testing.assert_close(final, torch.stack(finals))
        probe = torch.randn_like(outputs)
        parameters = list(layer.parameters())
        grads = torch.autograd.grad((outputs * probe).sum(), parameters)
        expected = torch.autograd.grad((steps.transpose(0, 1) * probe).sum(), parameters)
        torch.testing.assert_close(grads, expected)


def test_a_new_one_starts_as_the_paper_says() -> None:
    torch.manual_seed(3)
    layer = LowRankFastGRNN(INPUT, 200)
    torch.manual_seed(3)
    w = 0.1 * torch.randn(200, INPUT)
    torch.testing.assert_close(layer.weight_ih_l0.weight(), w, rtol=1e-4, atol=1e-5)
    assert layer.weight_hh_l0.weight().std().item() == pytest.approx(0.1, rel=0.02)
    assert {layer.zeta_l0.item(), layer.nu_l0.item()} == {1.0, -4.0}
    assert (layer.bias_gate_l0 == 1).all()
    assert (layer.bias_update_l0 == 1).all()
    names = {name.split(".")[0] for name in layer.state_dict()}
    assert names == {f"{n}_l0" for n in ("weight_ih", "weight_hh", "bias_gate", "bias_update", "zeta", "nu")}


def test_messages_name_the_class() -> None:
    with pytest.raises(ValueError, match=holding("LowRankFastGRNN .. 2D .. 3D .. 1D")):
        LowRankFastGRNN(INPUT, HIDDEN)(torch.randn(INPUT))
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        LowRankFastGRNN(INPUT, 0)
    with pytest.raises(RuntimeError, match=r"\(1, 2, 5\).* \[1, 3, 5\]"):
        LowRankFastGRNN(INPUT, HIDDEN)(torch.zeros(7, 2, INPUT), torch.zeros(1, 3, HIDDEN))
