"""Sparsified and low-rank models under `fully_shard`: every result is the one of a single process, bit for bit."""

import copy
import math
import tempfile
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from str_triton import (
    LowRankLinear,
    RankController,
    RankTarget,
    SparsityController,
    Target,
    count,
    count_ranks,
    densify,
    parameter_groups,
    plain_state_dict,
    soft_threshold,
    sparsify,
)
from str_triton.budget import allocate
from str_triton.budget.processes import Processes
from str_triton.budget.survivors import keep_exactly
from str_triton.nn import thresholded_weights
from str_triton.nn.shards import full, local, reshard, rows_here
from tests.distributed.checks import Check, outcomes

INPUT = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
ON_FOUR = ("equal weights", "replicas of shards", "checkpoint")
FULL = StateDictOptions(full_state_dict=True)


class Network(nn.Module):
    """Weights of many kinds; the rows of most are no multiple of 2 or 4, and one has fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.gru = nn.GRU(9, 6, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(6, 2, 11, dropout=0.0, batch_first=True)
        self.convolution = nn.Conv1d(6, 5, 3)
        self.left = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.gru(torch.relu(self.first(x)))[0])
        return self.last(self.left(self.convolution(x.mT).mT.relu()))


def network(coarse: bool = False, **options) -> nn.Module:
    """Return the same model in each process; with `coarse` many weights are equal, and many are 0."""
    torch.manual_seed(1)
    model = sparsify(Network(), exclude=["left"], **options)
    if coarse:
        with torch.no_grad():
            for weight in thresholded_weights(model):
                weight.dense.mul_(8).round_().div_(8)
    return model


def shard(model: nn.Module, partly: bool = False, **options) -> nn.Module:
    fully_shard(model.attention, **options)
    fully_shard(model.first, **options)
    return model if partly else fully_shard(model, **options)


def require_equal(sharded: nn.Module, single: nn.Module) -> None:
    mine, theirs = dict(sharded.named_parameters()), dict(single.named_parameters())
    assert mine.keys() == theirs.keys()
    reshard(sharded)
    different = [name for name in mine if not torch.equal(local(mine[name]), theirs[name][rows_here(mine[name])])]
    assert different == []


def drift(sharded: nn.Module, single: nn.Module, seed: int) -> None:
    """Change the weights of both models alike, as training does, by whole numbers of 1/32: coarse ones stay coarse."""
    torch.manual_seed(seed)
    for name, parameter in single.named_parameters():
        if "raw_threshold" not in name:
            change = (1.6 * torch.randn(parameter.shape)).round() / 32
            parameter.detach().add_(change)
            own = sharded.get_parameter(name)
            local(own).add_(change[rows_here(own)])


def pair(
    control: Callable[[nn.Module], SparsityController],
    controller_first: bool = False,
    mesh: DeviceMesh | None = None,
    partly: bool = False,
    **options,
) -> tuple[tuple[nn.Module, SparsityController], ...]:
    """Return a sharded and a whole model, alike, with their controllers. With `partly` some weights are not sharded."""
    model, single = network(**options), network(**options)
    if controller_first:
        controller = control(model)
        shard(model, partly, mesh=mesh)
    else:
        shard(model, partly, mesh=mesh)
        controller = control(model)
    return (model, controller), (single, control(single))


def check_schedule(control: Callable[[nn.Module], SparsityController], **options) -> None:
    (model, controller), (single, reference) = pair(control, **options)
    for step in range(1, 3):
        drift(model, single, seed=step)
        for one in (controller, reference):
            one.step(step / 2)
        require_equal(model, single)
        with controller.exact(), reference.exact():
            require_equal(model, single)
            assert count(model, INPUT) == count(single, INPUT)
            with torch.no_grad():
                assert torch.equal(model(INPUT), single(INPUT))  # gathers the outermost module's parameters for good
            mine, theirs = controller.state_dict(), reference.state_dict()
            require_same_state(mine, theirs)
        require_equal(model, single)


def require_same_state(mine: object, theirs: object) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            require_same_state(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for pair in zip(mine, theirs, strict=True):
            require_same_state(*pair)
    elif isinstance(mine, Tensor):
        assert type(mine) is type(theirs)
        assert torch.equal(mine, theirs)
    else:
        assert mine == theirs


def sparsity(model: nn.Module) -> SparsityController:
    return SparsityController(model, Target(sparsity=0.8), interval=2)


def flops(model: nn.Module) -> SparsityController:
    return SparsityController(
        model, Target(flops_share=0.5), interval=2, example_input=INPUT, distribution="flop-aware"
    )


def learned(model: nn.Module) -> SparsityController:
    return SparsityController(model, Target(sparsity=0.7), interval=2, distribution="learned", floor=0.9)


def by_layer(model: nn.Module) -> SparsityController:
    shares = {weight.name: 0.5 + 0.01 * i for i, weight in enumerate(thresholded_weights(model))}
    return SparsityController(model, Target(layers=shares), interval=2)


def two_dimensional(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))


def check_training(rank: int, size: int) -> None:
    """Each process has data of its own; the whole model is given the weights that come of it."""
    (model, controller), (single, reference) = pair(learned, granularity="filter")
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-3), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for step in range(4):
        model(torch.randn(INPUT.shape, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            single.get_parameter(name).detach().copy_(full(parameter))
        for one in (controller, reference):
            one.step((step + 1) / 4)
        require_equal(model, single)
    assert count(model, INPUT).nonzeros == round(0.3 * count(model, INPUT).params)


def check_checkpoint(rank: int, size: int) -> None:
    (model, controller), (single, reference) = pair(sparsity, coarse=True)
    for step in (1, 2):
        drift(model, single, seed=step)
        for one in (controller, reference):
            one.step(step / 4)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(folder)
    with controller.exact(), reference.exact():
        saved, state = get_model_state_dict(model, options=FULL), controller.state_dict()
        single_saved, single_state = copy.deepcopy(single), reference.state_dict()
        require_same_state(dict(saved), dict(single.state_dict()))
        require_same_state(plain_state_dict(saved), dict(densify(copy.deepcopy(single)).state_dict()))
        shards = plain_state_dict(model.state_dict())
        require_same_state({name: full(value) for name, value in shards.items()}, plain_state_dict(saved))
        checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder[0])

    def read(other: nn.Module) -> None:
        content = {"model": get_model_state_dict(other)}
        checkpoint.load(content, checkpoint_id=folder[0])
        set_model_state_dict(other, content["model"])

    for load in (read, lambda other: set_model_state_dict(other, saved, options=FULL)):
        (other, follower), _ = pair(sparsity)
        load(other)
        follower.load_state_dict(state)
        require_equal(other, single)
        last = copy.deepcopy(single_saved)
        guide = sparsity(last)
        guide.load_state_dict(single_state)
        for step in (3, 4):
            drift(other, last, seed=step)
            for one in (follower, guide):
                one.step(step / 4)
            require_equal(other, last)


def check_sampled() -> None:
    """The cut is guessed from a sample, of which each process draws a part. The result does not depend on it."""
    with mock.patch.object(allocate, "SAMPLE", 300):
        check_schedule(flops, g="sigmoid", gradient="masked", partly=True)


def check_ties(rank: int, size: int) -> None:
    """Among equal weights the last are cut and the first are kept, whichever process holds them."""
    for excess in (5, -5):
        model, single = shard(network(coarse=True)), network(coarse=True)
        for one in (model, single):
            for weight in thresholded_weights(one):
                local(weight.raw).fill_(math.log(0.2))
                keep_exactly(weight, weight.local_raw, excess, Processes.of([weight.dense]))
        require_equal(model, single)


def check_not_a_number(rank: int, size: int) -> None:
    """All processes report NaN in the rows of one: a process that raised alone would leave the others waiting."""
    (model, controller), _ = pair(sparsity)
    if rank == size - 1:
        local(model.first.get_parameter("weight"))[-1, -1] = torch.nan
    with pytest.raises(ValueError, match="first"):
        controller.finish()


def check_ranks(distribution: str, controller_first: bool) -> None:
    def low_rank() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(LowRankLinear(7, 9), nn.ReLU(), LowRankLinear(9, 5))

    def control(model: nn.Module) -> RankController:
        return RankController(model, RankTarget(total_rank=5), distribution=distribution, interval=1)

    model, single = low_rank(), low_rank()
    if controller_first:
        controller = control(model)
        fully_shard(model)
    else:
        fully_shard(model)
        controller = control(model)
    reference = control(single)
    for step in range(1, 7):
        drift(model, single, seed=step)
        for one in (controller, reference):
            one.step(step / 6)
        require_equal(model, single)
        with controller.exact(), reference.exact():
            assert count_ranks(model) == count_ranks(single)
            require_equal(model, single)
            require_same_state(controller.state_dict(), reference.state_dict())
    assert count_ranks(model).total_rank == 5
    assert torch.equal(model[0].compact().weight.u, single[0].compact().weight.u)


def check_ranks_after_a_forward() -> None:
    """A forward leaves the parameters gathered. The first components are equal, so that solve() changes m."""
    dense = nn.Linear(6, 6)
    nn.init.eye_(dense.weight)
    single = LowRankLinear.from_dense(dense)
    model = fully_shard(copy.deepcopy(single))
    pairs = [(one, RankController(one, RankTarget(total_rank=4), schedule="constant")) for one in (model, single)]
    calls = [("solve", []), ("step", [0.2]), ("step", [0.5]), ("step", [0.6]), ("finish", [])]
    for seed, (name, arguments) in enumerate(calls):
        for one, controller in pairs:
            with torch.no_grad():
                one(torch.ones(1, 6))
            getattr(controller, name)(*arguments)
        require_equal(model, single)
        assert count_ranks(model).total_rank == 4
        drift(model, single, seed)


def check_op(rank: int, size: int) -> None:
    """Values and gradients of a DTensor, however it is spread."""
    mesh = init_device_mesh("cpu", (size,))
    x, grad = torch.randn(6, 5), torch.randn(6, 5)
    for shape in ((1,), (6, 1), (6, 5)):
        raw = torch.randn(shape) - 1
        for placement in (Shard(0), Shard(1), Replicate()):
            for sharded_raw in (True, False):
                want, own = [x.clone().requires_grad_(), raw.clone().requires_grad_()], []
                expected = soft_threshold(*want, gradient="masked")
                expected.backward(grad)
                raw_placement = placement if placement == Shard(0) else Replicate()
                own.append(distribute_tensor(x.clone(), mesh, [placement]).requires_grad_())
                own.append(distribute_tensor(raw.clone(), mesh, [raw_placement]) if sharded_raw else raw.clone())
                own[1].requires_grad_()
                out = soft_threshold(*own, gradient="masked")
                assert torch.equal(full(out), expected)
                out.backward(distribute_tensor(grad, mesh, [placement]))
                for mine, theirs in zip(own, want, strict=True):
                    torch.testing.assert_close(full(mine.grad), theirs.grad)


def check_refusals(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="before fully_shard"):
        sparsify(fully_shard(nn.Linear(4, 4)))
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # An empty one: a real one needs an accelerator.
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = nn.Linear(4, 4)
    for act in (sparsify, densify, lambda model: count(model, INPUT)):
        with pytest.raises(ValueError, match="fully_shard"):
            act(nn.Sequential(flat))
    model = sparsify(nn.Sequential(nn.Linear(4, 4)))
    for name in ("weight", "raw_threshold"):
        parameter = distribute_tensor(model[0].get_parameter(name), init_device_mesh("cpu", (size,)), [Shard(0)])
        if name == "weight":
            parameter = parameter.redistribute(placements=[Shard(1)])
        setattr(model[0], name, nn.Parameter(parameter))
    for act in (lambda: SparsityController(model, Target(sparsity=0.5)), lambda: count(model, INPUT[..., :4])):
        with pytest.raises(ValueError, match="tensor-parallel"):
            act()
    mesh, other = (init_device_mesh("cpu", (size,), mesh_dim_names=(name,)) for name in "ab")
    x, raw = torch.randn(4, 4), distribute_tensor(torch.zeros(4, 1), other, [Shard(0)])
    for arguments, message in (
        ((x, raw), "raw_threshold is a DTensor and x is not"),
        ((DTensor.from_local(x, mesh, [Partial()]), raw), "Partial"),
        ((distribute_tensor(x, mesh, [Shard(0)]), raw), "shard them alike"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_threshold(*arguments)


def check_densify(rank: int, size: int) -> None:
    """Every process gets the whole plain model, also after a forward that left gathered parameters behind."""
    (model, controller), (single, reference) = pair(sparsity)
    with torch.no_grad():
        model(INPUT)
    for one in (controller, reference):
        one.step(1.0)
    densify(model)
    densify(single)
    assert [type(module) for module in model.modules()] == [type(module) for module in single.modules()]
    require_same_state(dict(model.state_dict()), dict(single.state_dict()))
    assert torch.equal(model(INPUT), single(INPUT))
    model(INPUT).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def check_mixed_precision(rank: int, size: int) -> None:
    """The forward sees weights and thresholds in bfloat16; the budget is the one of the float32 parameters."""
    single = sparsify(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)))
    model = copy.deepcopy(single)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for one in (model, single):
        sparsity(one).step(1.0)
    x = torch.randn(4, 40)
    assert count(model, x) == count(single, x)


def check_printing(rank: int, size: int) -> None:
    """A process may print its model alone."""
    model = shard(network())
    low_rank = fully_shard(LowRankLinear(4, 4))
    if rank == 0:
        assert "STRLinear" in repr(model)
        assert "LowRankWeight" in repr(low_rank)


def checks() -> dict[str, Check]:
    return {
        "sparsity, controller first": lambda *_: check_schedule(sparsity, controller_first=True),
        "equal weights": lambda *_: check_schedule(sparsity, coarse=True),
        "weight": lambda *_: check_schedule(sparsity, granularity="weight", controller_first=True),
        "flops, sampled, some weights whole": lambda *_: check_sampled(),
        "ties": check_ties,
        "not a number": check_not_a_number,
        "learned": lambda *_: check_schedule(learned, granularity="filter"),
        "by layer": lambda *_: check_schedule(by_layer, coarse=True, partly=True),
        "replicas of shards": lambda rank, size: check_schedule(sparsity, mesh=two_dimensional(size)),
        "training": check_training,
        "checkpoint": check_checkpoint,
        "ranks": lambda *_: check_ranks("fixed", controller_first=True),
        "relative ranks": lambda *_: check_ranks("relative", controller_first=True),
        "learned ranks": lambda *_: check_ranks("learned", controller_first=False),
        "ranks after a forward": lambda *_: check_ranks_after_a_forward(),
        "op": check_op,
        "refusals": check_refusals,
        "densify": check_densify,
        "mixed precision": check_mixed_precision,
        "printing": check_printing,
    }


CASES = [(2, name) for name in checks()] + [(4, name) for name in ON_FOUR]


def checks_on_four() -> dict[str, Check]:
    return {name: checks()[name] for name in ON_FOUR}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    return {
        size: outcomes(some, tmp_path_factory.mktemp("job"), size) for size, some in ((2, checks), (4, checks_on_four))
    }


@pytest.mark.parametrize(("size", "name"), CASES)
def test_the_result_is_that_of_one_process(size: int, name: str, found: dict[int, dict[str, str]]) -> None:
    if found[size][name]:
        pytest.fail(found[size][name], pytrace=False)
