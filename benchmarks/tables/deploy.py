"""Tables about deployment: sparse execution, packed files, C."""

from typing import Any

from benchmarks.tables.documents import SPARSE_EXECUTION, markdown, results, section, spread, table


def sparse_runs() -> list[tuple[str, str, dict[str, Any]]]:
    """Return network, processor and entry of every run of sparse_inference, those of one network side by side."""
    runs = [
        (name, run["machine"]["processor"], run)
        for networks in results("sparse_inference*.json")
        for name, run in networks.items()
    ]
    return sorted(runs, key=lambda run: run[0])


@table("sparse-inference")
def sparse_inference() -> str:
    """Return the milliseconds per image of compile_sparse and other engines, and its speedup."""
    rows = []
    for name, processor, run in sparse_runs():
        times, ratios = run["milliseconds"], run["times_as_fast"]
        peers = [f"{times[peer]:.1f} ({ratios[peer]:.2f}x)" if peer in times else "not measured" for peer in PEERS]
        rows.append([name.replace("-", ", ") + " %", processor, f"{times['compile_sparse']:.1f}", *peers])
    peers = [f"{peer}, ms" for peer in PEERS]
    return markdown(["network, sparsity", "processor", "compile_sparse, ms", *peers], rows)


PEERS = ("eager", "torch.compile", "onnxruntime", "deepsparse", "MNN")


@table("sparse-time")
def sparse_time() -> str:
    """Return the time of compile_sparse by kind of layer."""
    kinds: dict[str, None] = {}
    for *_, run in sparse_runs():
        kinds |= dict.fromkeys(run["share_of_time"])
    rows = [
        [
            name.replace("-", ", ") + " %",
            processor,
            *(f"{100 * run['share_of_time'].get(kind, 0):.0f}" for kind in kinds),
        ]
        for name, processor, run in sparse_runs()
    ]
    return markdown(["network; share of time, %", "processor", *kinds], rows)


NEIGHBOR = """While the calls are timed, another process keeps one thread busy (`python -m
benchmarks.speed.busy_neighbor`). "95 %" is the 95th percentile of the times; beside a busy process it should stay below
2.5 times the median."""


@table("busy-neighbor")
def busy_neighbor() -> str:
    """Return medians and 95th percentiles alone and beside a busy neighbour, by network and machine."""
    rows = []
    for run in results("busy_neighbor_*.json"):
        for name, figures in run["networks"].items():
            alone, beside = figures["alone"], figures["beside"]
            times = [f"{part[key]:.1f}" for part in (alone, beside) for key in ("median_ms", "p95_ms")]
            machine = f"{run['machine']['processor']}, {figures['threads']} threads"
            rows.append(
                [f"{name.replace('-', ', ')} %, {machine}", *times, f"{beside['p95_ms'] / beside['median_ms']:.2f}"]
            )
    header = ["network, sparsity", "alone, ms", "95 %", "beside, ms", "95 %", "95 % / median"]
    return section("### Beside a busy neighbour", NEIGHBOR, markdown(header, rows))


@table("packed-sizes")
def packed_sizes() -> str:
    """Return the size of packed files at published sparsities, in MB."""
    (run,) = results("packed_sizes.json")
    rows = []
    for name, sizes in run["sizes"].items():
        cells = [f"{sizes['float32']['dense_bytes'] / 1e6:.1f}"]
        cells += [f"{sizes[values]['bytes'] / 1e6:.2f}" for values in ("float32", "float16")]
        if name in PACKED:
            rows.append([f"{name} %", *cells])
    return markdown(["network, sparsity", "dense, MB", "float32, MB", "float16, MB"], rows)


PACKED = ("resnet50 79.55", "resnet50 90.23", "resnet50 95.03", "resnet50 98.05", "mobilenetv1 89.01")


@table("c-export")
def c_export() -> str:
    """Return size, accuracy and time of networks for Japanese Vowels as C."""
    (run,) = results("c_export.json")
    rows = []
    for name in dict.fromkeys(row["network"] for row in run["rows"]):
        own = [row for row in run["rows"] if row["network"] == name]
        small = [row["int8"] for row in own]
        rows.append(
            [
                name,
                f"{max(row['parameters'] for row in own):,}",
                f"{max(row['weight_bytes'] for row in small):,}",
                f"{max(row['state_bytes'] for row in small):,}",
                spread((row["float32"]["accuracy"] for row in own), 100),
                spread((row["accuracy"] for row in small), 100),
                f"{max(row['microseconds_per_frame'] for row in small):.1f}",
                str(len(own)),
            ]
        )
    header = ["network", "parameters", "int8 weights, bytes", "state, bytes", "float32 accuracy %", "int8 accuracy %"]
    return markdown([*header, "us a frame", "seeds"], rows)


@table("timm", SPARSE_EXECUTION)
def timm_networks() -> str:
    """Give timm's families by compile_sparse: layers by execution, differences, and times where there are some."""
    (networks,) = results("timm_networks.json")
    rows, processors = [], set()
    for name, steps in networks.items():
        check, timed = steps.get("check", {}), steps.get("time")
        executions = (timed or {}).get("timed_executions") or check.get("executions", {})
        left = check.get("left", 0)
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(executions.items()))
        differences = check.get("largest_difference", {})
        cells = [f"{differences[key]:.1e}" if key in differences else "" for key in ("compiled", "eager")]
        saved = "yes" if check and not check["not_saved"] else "no"
        saved += ", for one image" if check.get("loaded_refuses") else ""
        times = [""] * 3
        if timed:
            ratios = timed["times_as_fast"]
            times = [f"{timed['milliseconds']['compile_sparse']:.1f}"]
            times += [f"{ratios[peer]:.2f}x" if peer in ratios else "" for peer in ("eager", "onnxruntime")]
            processors.add(timed["machine"]["processor"])
        rows.append([name, layers + (f", {left} by torch" if left else ""), *cells, saved, *times])
    header = ["network", "layers", "difference", "eager's", "saved", "ms", "eager", "onnxruntime"]
    header[5] += f", {' or '.join(sorted(processors))}" if processors else ""
    return markdown(header, rows)
