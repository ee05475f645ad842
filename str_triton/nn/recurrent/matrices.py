"""The parameters of a recurrent layer under torch's names, and the conversion from and to dense layers."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from str_triton.nn.control import warn_if_unfinished
from str_triton.nn.low_rank import FactorOptions, LowRankWeight

FACTORIZE = ("both", "recurrent", "none")


class TorchArguments(TypedDict):
    """The arguments that torch's layers have as well."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool


class ConversionOptions(TypedDict, total=False):
    """The keyword-only arguments of the layers, without max_rank, device and dtype."""

    input_max_rank: int | None
    factorize: str
    ranks: Mapping[str, int] | None
    g: str
    gradient: str
    raw_threshold_init: float


class LowRankMatrices(nn.Module):
    """The base class of the recurrent layers without the forward pass: parameters and conversions.

    Matrices are registered as `weight_ih_l0`, `weight_hh_l0`, `weight_ih_l0_reverse`, ... A matrix in factors is a
    `LowRankWeight`, a dense matrix a Parameter. The rows of a matrix hold all gates, so the gates share one spectrum.
    """

    gates: ClassVar[int]
    biases: ClassVar[tuple[str, ...]] = ("bias_ih", "bias_hh")
    scalars: ClassVar[tuple[str, ...]] = ()
    # The torch layer with the same arguments, and whether it computes the same function.
    torch_class: ClassVar[type[nn.GRU | nn.LSTM | nn.RNN]]
    has_dense: ClassVar[bool] = False
    weight_hh_l0: LowRankWeight | nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        max_rank: int | None = None,
        input_max_rank: int | None = None,
        factorize: str = "both",
        ranks: Mapping[str, int] | None = None,
        g: str = "exp",
        gradient: str = "masked",
        raw_threshold_init: float = -10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if factorize not in FACTORIZE:
            raise ValueError(f"factorize must be one of {', '.join(map(repr, FACTORIZE))}, got {factorize!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        # torch's own layer checks these arguments, with torch's messages.
        self.torch_class(**_arguments(self), device="meta")
        self.factorize = factorize
        shapes = dict(self._shapes())
        options: FactorOptions = {"thresholded": False}
        if ranks is None:
            ranks = self._max_ranks(shapes, max_rank, input_max_rank)
            options = {"g": g, "gradient": gradient, "raw_threshold_init": raw_threshold_init}
        if unknown := [name for name in ranks if not name.startswith("weight") or name not in shapes]:
            known = ", ".join(name for name in shapes if name.startswith("weight"))
            raise ValueError(f"ranks may name {known}; got {', '.join(unknown)}")
        for name, shape in shapes.items():
            if name in ranks:
                options["recurrent"] = name.startswith("weight_hh")
                rows, columns = shape
                matrix = LowRankWeight(rows, columns, ranks[name], device="meta", dtype=dtype, **options)
                self.add_module(name, matrix)
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)))
        # Nothing was drawn so far, so `reset_parameters` draws the same numbers as torch's layer.
        self.to_empty(device=torch.empty(0, device=device).device)
        self.reset_parameters()

    def _max_ranks(
        self, shapes: Mapping[str, tuple[int, ...]], max_rank: int | None, input_max_rank: int | None
    ) -> dict[str, int]:
        """Return the maximum rank of each matrix that `factorize` selects."""
        if input_max_rank is not None and input_max_rank < 1:
            raise ValueError(f"input_max_rank must be at least 1, got {input_max_rank}")
        ranks = {}
        for name, shape in shapes.items():
            if name.startswith("weight_hh") and self.factorize != "none":
                ranks[name] = shape[1] if max_rank is None else max_rank
            elif name.startswith("weight_ih") and self.factorize == "both":
                # The layers' inputs differ in size, so their full ranks differ as well.
                ranks[name] = min(*shape, *([] if input_max_rank is None else [input_max_rank]))
        return ranks

    def _suffixes(self, layer: int) -> list[str]:
        """Return the suffixes of a layer's parameter names, one for each direction."""
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every parameter of torch's layer, in torch's order."""
        rows = self.gates * self.hidden_size
        for layer in range(self.num_layers):
            suffixes = self._suffixes(layer)
            columns = len(suffixes) * self.hidden_size if layer else self.input_size
            for suffix in suffixes:
                yield f"weight_ih_{suffix}", (rows, columns)
                yield f"weight_hh_{suffix}", (rows, self.hidden_size)
                yield from ((f"{name}_{suffix}", (rows,)) for name in self.biases if self.bias)
                yield from ((f"{name}_{suffix}", (1,)) for name in self.scalars)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as torch's layer does. At full rank the same seed gives the same function."""
        for name, shape in self._shapes():
            self._set(name, self._initial(name, torch.empty(shape, device=self._device, dtype=self._dtype)))

    def _initial(self, name: str, value: Tensor) -> Tensor:
        """Draw the initial value of a parameter into `value`."""
        bound = self.hidden_size**-0.5
        return value.uniform_(-bound, bound)

    @torch.no_grad()
    def _set(self, name: str, value: Tensor) -> None:
        own = getattr(self, name)
        if isinstance(own, LowRankWeight):
            own.reset_parameters(value)
        else:
            own.copy_(value)

    @torch.no_grad()
    def _get(self, name: str) -> Tensor:
        own = getattr(self, name)
        return own.weight() if isinstance(own, LowRankWeight) else own

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        matrix = self.weight_hh_l0
        return matrix.u.dtype if isinstance(matrix, LowRankWeight) else matrix.dtype

    def _like(self, **options: Unpack[ConversionOptions]) -> Self:
        layer = type(self)(**_arguments(self), device="meta", dtype=self._dtype, **options)
        return layer.to_empty(device=self._device).train(self.training)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, dense: nn.RNNBase, *, max_rank: int | None = None, **options: Unpack[ConversionOptions]
    ) -> Self:
        """Make a layer from copies of a dense layer's singular components, the largest ones where a rank is limited.

        Args:
            dense: nn.GRU for LowRankGRU, nn.LSTM for LowRankLSTM.
            max_rank, options: the keyword-only arguments of the class, except device and dtype.

        Raises:
            TypeError: dense is of another type, or of one with a forward of its own.
            ValueError: dense has proj_size, or unknown options.
        """
        if not cls.has_dense:
            raise TypeError(f"torch has no dense form of {cls.__name__}")
        if not isinstance(dense, cls.torch_class):
            raise TypeError(
                f"{cls.__name__}.from_dense needs nn.{cls.torch_class.__name__}, got {type(dense).__name__}"
            )
        if type(dense).forward is not cls.torch_class.forward:
            raise TypeError(f"{type(dense).__name__} has a forward of its own, which {cls.__name__} would not keep")
        if dense.proj_size:
            raise ValueError(
                f"{cls.__name__} has no projections: proj_size must be 0, got {dense.proj_size}. "
                "`sparsify` prunes nn.LSTM with its projections"
            )
        _, weight = dense.all_weights[0][:2]  # weight_ih_l0 and weight_hh_l0
        layer = cls(**_arguments(dense), max_rank=max_rank, device="meta", dtype=weight.dtype, **options)
        layer.to_empty(device=weight.device)
        for name, _ in layer._shapes():
            layer._set(name, getattr(dense, name))
        return layer.train(dense.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return a new dense layer that computes the same function: nn.GRU for LowRankGRU, nn.LSTM for LowRankLSTM.

        torch has no FastGRNN, so LowRankFastGRNN returns its own class with factorize="none".
        """
        dense: nn.Module
        if not self.has_dense:
            dense = self._like(factorize="none")
        else:
            dense = self.torch_class(**_arguments(self), device="meta", dtype=self._dtype)
            dense = dense.to_empty(device=self._device).train(self.training)
        for name, _ in self._shapes():
            getattr(dense, name).copy_(self._get(name))
        return dense

    @torch.no_grad()
    def compact(self) -> Self:
        """Return a new layer that holds only the surviving components, without thresholds.

        A matrix becomes a dense Parameter where its factors would not be smaller. The new layer's state dict fits a
        layer made with `ranks=compact.ranks()` and the same sizes.

        Warns:
            UserWarning: the model does not meet its controller's target.
        """
        warn_if_unfinished(self)
        compacted = {name: factor.compact() for name, factor in self.factors().items()}
        matrices = {name: matrix for name, matrix in compacted.items() if matrix is not None}
        layer = self._like(ranks={name: matrix.max_rank for name, matrix in matrices.items()})
        for name, _ in self._shapes():
            if name in matrices:
                setattr(layer, name, matrices[name])
            else:
                layer._set(name, self._get(name))
        return layer

    def factors(self) -> dict[str, LowRankWeight]:
        """Return the matrices in factors by their names in the layer, such as weight_hh_l0_reverse."""
        names = (name for name, _ in self._shapes())
        return {name: own for name in names if isinstance(own := getattr(self, name), LowRankWeight)}

    def ranks(self) -> dict[str, int]:
        """Return the rank of each matrix of `factors()`: the number of components that survive the threshold."""
        return {name: factor.rank for name, factor in self.factors().items()}

    def extra_repr(self) -> str:
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        given = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join(
            [f"{self.input_size}, {self.hidden_size}", *(f"{name}={value}" for name, value in given.items())]
        )


def _arguments(layer: nn.RNNBase | LowRankMatrices) -> TorchArguments:
    return {
        "input_size": layer.input_size,
        "hidden_size": layer.hidden_size,
        "num_layers": layer.num_layers,
        "bias": layer.bias,
        "batch_first": layer.batch_first,
        "dropout": layer.dropout,
        "bidirectional": layer.bidirectional,
    }
