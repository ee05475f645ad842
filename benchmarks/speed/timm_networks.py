"""timm's families through `deploy.compile_sparse`, with random zeros in 90 % of every convolution and linear layer.

    python -m benchmarks.speed.timm_networks check [--only NAME ...]
    python -m benchmarks.speed.timm_networks time [--only NAME ...] [--rounds 11] [--threads 2]

`check` compares each network with the model in float64 (batch 1 and 2), saves and loads it, and notes how every layer
is executed; it chooses executions without timing. `time` compiles with timing and lets eager PyTorch (the faster of two
memory formats), onnxruntime and the compiled network take turns at batch 1; it needs a quiet machine. Every turn waits
until the threads of the one before stand still: onnxruntime's spin after a call, and would take a core from the next.
Both merge their rows into benchmarks/results/timm_networks.json; the processor stands in each. It needs
`pip install timm onnx onnxruntime`.
"""

import argparse
import copy
import functools
import importlib.machinery
import json
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.timing import RESULTS, machine, median_ratio, version
from str_triton import deploy
from str_triton.files import write_atomically

RESULT = RESULTS / "timm_networks.json"
SPARSITY = 0.9
FAMILIES = (
    "resnet18", "resnet50", "seresnext26t_32x4d", "skresnet18", "resnest14d", "res2net50_26w_4s", "regnetx_002",
    "regnety_002", "densenet121", "dla46_c", "hrnet_w18_small", "vgg11_bn", "repvgg_a0", "mobileone_s0",
    "ese_vovnet19b_dw", "cspresnet50", "nf_regnet_b0", "inception_v3", "mobilenetv2_050", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "efficientnet_b0", "tf_efficientnetv2_b0", "mnasnet_small", "ghostnet_050", "rexnet_100",
    "lcnet_050", "convnext_atto", "convnextv2_atto", "inception_next_tiny", "poolformer_s12", "fastvit_t8",
    "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0", "efficientformer_l1", "levit_128s",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
    "pvt_v2_b0", "xcit_nano_12_p16_224", "cait_xxs24_224", "coat_lite_tiny", "mixer_s32_224", "resmlp_12_224",
    "gmlp_ti16_224", "sequencer2d_s",
)  # fmt: skip


def import_timm() -> types.ModuleType:
    """Import timm, beside a torch for which there is no torchvision with stubs in its place."""
    try:
        import torchvision  # noqa: F401 (whether it can be imported is the question)
    except Exception:  # It fails in several ways beside another torch.
        names = ("transforms.functional", "datasets.folder", "ops.misc", "models.feature_extraction")
        for name in sorted(
            {f"torchvision.{n}" for full in names for n in (full, full.split(".")[0])} | {"torchvision"}
        ):
            stub = _Stub(name)
            sys.modules[name] = stub
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stub)
    import timm

    return timm


class _Stub(types.ModuleType):
    """A module all of whose names are classes that do nothing."""

    __path__: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        modes = ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS", "HAMMING", "BOX")
        return type(name, (), {mode: number for number, mode in enumerate(modes)})


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random zeros and norms that fit its weights, in eval mode, and an image."""
    torch.manual_seed(0)
    model = import_timm().create_model(name)
    image = torch.randn(1, *model.default_cfg["input_size"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if not module.weight.any():  # A classifier that begins with zeros would hide every difference.
                nn.init.normal_(module.weight, std=0.02)
            module.weight.data *= torch.rand_like(module.weight) >= SPARSITY
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, *image.shape[1:]))
    return model.eval(), image


def check(name: str) -> dict[str, Any]:
    """Compare a compiled network with its model, and its saved and loaded copy with it."""
    model, image = build(name)
    begin = time.process_time()
    compiled = deploy.compile_sparse(model, image, tune=False)
    seconds = time.process_time() - begin
    saved, made = "", {"compiled": compiled}
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save(Path(folder) / "net")
            made["loaded"] = deploy.load_sparse(Path(folder) / "net")
        except ValueError as error:
            saved = str(error)
    differences, refused = dict.fromkeys(("eager", *made), 0.0), []
    exact = copy.deepcopy(model).double()
    for batch in (1, 2):
        x = torch.randn(batch, *image.shape[1:])
        with torch.no_grad():
            wanted, plain = exact(x.double()), model(x)
        results = {"eager": plain, "compiled": compiled(x)}
        try:
            results |= {"loaded": made["loaded"](x)} if "loaded" in made else {}
        except ValueError as error:  # A file holds what was exported, and no model to fall back to.
            refused.append(f"batch {batch}: {error}")
        for key, result in results.items():
            differences[key] = float(np.maximum(differences[key], difference(result, wanted)))  # keeps NaN
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "sparsity": 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights),
        "image": list(image.shape[1:]),
        "form": type(compiled).__name__,
        "executions": dict(Counter(choice.execution for _, choice in compiled.layers())),
        "left": len(compiled.left),
        "notes": compiled.notes,
        "not_saved": saved,
        "loaded_refuses": refused,
        "largest_difference": differences,
        "export_seconds": seconds,
    }


def difference(found: Any, wanted: Any) -> float:
    """Return the largest difference as a part of the largest value; NaN where a value is NaN or all are zero."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
    return float(torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]).max())


def measure(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Return milliseconds at batch 1 and the execution of every layer, chosen by timing."""
    from benchmarks.speed.sparse_inference import in_turns, repeated

    torch.set_num_threads(threads)
    model, image = build(name)
    begin = time.perf_counter()
    compiled = deploy.compile_sparse(model, image)
    seconds = time.perf_counter() - begin
    last = model.to(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], Any]] = {
        "compile_sparse": functools.partial(compiled, image),
        "eager contiguous": functools.partial(copy.deepcopy(model).to(memory_format=torch.contiguous_format), image),
        "eager channels_last": functools.partial(last, image.contiguous(memory_format=torch.channels_last)),
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        problem = ""
        try:
            functions["onnxruntime"] = _onnxruntime(model, image, Path(folder) / "net.onnx", threads)
        except Exception as error:  # The exporter fails in as many ways as models do.
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        times = in_turns({key: repeated(function) for key, function in functions.items()}, rounds)
    medians = {key: 1e3 * median(values) for key, values in times.items()}
    eager = min(("eager contiguous", "eager channels_last"), key=medians.__getitem__)
    peers = {"eager": eager} | ({"onnxruntime": "onnxruntime"} if "onnxruntime" in times else {})
    return {
        "threads": threads,
        "rounds": rounds,
        "compile_seconds": seconds,
        "milliseconds": medians,
        "times_as_fast": {key: median_ratio(times, peer, "compile_sparse") for key, peer in peers.items()},
        "timed_executions": dict(Counter(choice.execution for _, choice in compiled.layers())),
        "timing_notes": compiled.notes,
        "onnx_problem": problem,
    }


def _onnxruntime(model: nn.Module, image: Tensor, path: Path, threads: int) -> Callable[[], Any]:
    from benchmarks.speed.sparse_inference_peers import onnx_file, onnxruntime_session

    onnx_file(model.to(memory_format=torch.contiguous_format), image, path)
    session = onnxruntime_session(path, threads)
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feed)


def merge(name: str, row: dict[str, Any], step: str) -> None:
    """Write a row's values into the result file, each with the machine that they come from."""
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    versions = {key: version(key) for key in ("timm", "onnxruntime")}
    rows.setdefault(name, {})[step] = {"machine": machine() | versions, **row}
    write_atomically(RESULT, (json.dumps(dict(sorted(rows.items())), indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("check", "time"))
    parser.add_argument("--only", nargs="+", default=FAMILIES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.only:
        row = check(name) if options.step == "check" else measure(name, options.rounds, options.threads)
        merge(name, row, options.step)
        shown = ("form", "executions", "left", "not_saved", "largest_difference", "milliseconds", "times_as_fast")
        print(name, {key: row[key] for key in shown if key in row}, flush=True)


if __name__ == "__main__":
    main()
