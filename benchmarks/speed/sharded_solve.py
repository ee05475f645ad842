"""The cost of a solve where `fully_shard` has spread the weights over processes: seconds, messages, and bytes.

    python -m benchmarks.speed.sharded_solve [--processes 2] [--layers 54] [--rounds 5]

The model is layers of 512 x 1024 normally distributed weights, on the CPU by gloo, one thread a process. The same model
whole in one process is the comparison; the other processes wait meanwhile. Bytes are those that one process hands to
all-reduce in one solve.
"""

import argparse
import datetime
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.timing import write
from str_triton import SparsityController, Target, sparsify
from str_triton.budget.processes import Processes

ROWS, COLUMNS = 512, 1024


def network(layers: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(layers)])
    for layer in model:
        nn.init.normal_(layer.weight, std=0.02)
    return sparsify(model)


def controlled(model: nn.Module) -> SparsityController:
    return SparsityController(model, Target(sparsity=0.9), schedule="constant")


def solves(controller: SparsityController, rounds: int) -> dict[str, float]:
    """Return the median time of a solve, and the median processor time of this process, in seconds."""
    controller.solve()
    wall, processor = [], []
    for _ in range(rounds):
        begin, begin_processor = time.perf_counter(), time.process_time()
        controller.solve()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    return {"seconds": median(wall), "processor_seconds": median(processor)}


def process(rank: int, size: int, store: str, layers: int, rounds: int) -> None:
    """Be one of the processes; process 0 prints and writes the figures."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=10)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    whole = solves(controlled(network(layers)), rounds) if rank == 0 else {}
    distributed.barrier()
    controller = controlled(fully_shard(network(layers)))
    sharded = solves(controller, rounds)
    sent: list[int] = []
    reduced = Processes._reduced

    def counted(self: Processes, numbers: Tensor, operation: str) -> Tensor:
        sent.append(numbers.nbytes)
        return reduced(self, numbers, operation)

    Processes._reduced = counted
    controller.solve()
    Processes._reduced = reduced
    if rank == 0:
        figures = {
            "processes": size,
            "weights": layers * ROWS * COLUMNS,
            "layers": layers,
            "one_process": whole,
            "sharded": sharded,
            "messages": len(sent),
            "bytes": sum(sent),
        }
        print(figures)
        write("sharded_solve", figures)
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=54)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["str_triton", "benchmarks.timing", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        arguments = (options.processes, store, options.layers, options.rounds)
        processes = [context.Process(target=process, args=(rank, *arguments)) for rank in range(options.processes)]
        for one in processes:
            one.start()
        for one in processes:
            one.join()


if __name__ == "__main__":
    main()
