"""Tables about networks on 8-bit integers."""

from typing import Any

from benchmarks.tables.documents import NONE, SPARSE_EXECUTION, counted, markdown, results, section, table


@table("int8-kernels", SPARSE_EXECUTION)
def int8_kernels() -> str:
    """Return the microseconds of single layers in float32 and on bytes, by processor and path."""
    rows, names = [], {}
    for run in results("int8_kernels_*.json"):
        for layer in run["layers"]:
            times = layer["microseconds"]
            names |= dict.fromkeys(name for name in times if name != "float32")
            kind = "depthwise " if layer["groups"] == layer["inputs"] else ""
            window = f"{kind}{layer['kernel']}x{layer['kernel']}" + (
                f", stride {layer['stride']}" * (layer["stride"] > 1)
            )
            rows.append((run["machine"]["processor"], layer, window, times))
    cells = [
        [
            f"{layer['inputs']} -> {layer['outputs']}, {layer['side']}",
            window,
            f"{layer['sparsity']}",
            processor,
            f"{times['float32']:.0f}",
            *(f"{times[name]:.0f} ({times['float32'] / times[name]:.2f}x)" if name in times else "" for name in names),
        ]
        for processor, layer, window, times in rows
    ]
    return markdown(["channels, side", "window", "sparsity, %", "processor", "float32, us", *names], cells)


@table("int8-inference", SPARSE_EXECUTION)
def int8_inference() -> str:
    """Return the milliseconds of a call in float32 and on integers, of ours and of other engines."""
    rows = [row for run in results("int8_inference_*.json") for row in run["rows"]]
    cells = []
    for row in rows:
        times, ratios = row["milliseconds"], row["times_as_fast"]
        peers = [f"{times[peer]:.1f} ({ratios[peer]:.2f}x)" if peer in times else NONE for peer in PEERS]
        network = row["network"].replace("-", ", ") + " %"
        cells.append([network, row["machine"]["processor"], str(row["batch"]), f"{times['int8']:.1f}", *peers])
    header = ["network, sparsity", "processor", "batch", "int8, ms", *(f"{peer}, ms" for peer in PEERS)]
    return section("### Whole networks", WHOLE, markdown(header, cells))


PEERS = ("float32", "onnxruntime int8", "OpenVINO int8")
WHOLE = """`benchmarks/speed/int8_inference.py` times whole networks with random weights at published sparsities, on
images of 224x224 with two threads. The columns are the milliseconds of a call: of the compiled network on integers, of
the compiled network in float32, and of other engines on the QDQ file of the same quantized network. All of them take
turns. A number in brackets is the time divided by that of the network on integers. The Intel Xeon has VNNI, the AMD
EPYC AVX2 without VNNI. Without VNNI the other engines add pairs of products in 16 bits with saturation;
`compile_sparse` does not. With onnxruntime's option for exact sums, `session.x64quantprecision`, its outputs of
MobileNetV1 equal ours. The table times it without that option. The other engines also round ResNet50's residual sums in
their own way."""


@table("kernel-limits", SPARSE_EXECUTION)
def kernel_limits() -> str:
    """Return the time of each kind of layer, and the parts of it that the processor's limits would take."""
    cells = []
    for run in results("kernel_limits_*.json"):
        for network in run["networks"]:
            kinds: dict[str, list[dict[str, Any]]] = {}
            for row in network["rows"]:
                kinds.setdefault(row.get("window", OTHER), []).append(row)
            for kind, rows in sorted(kinds.items(), key=lambda item: (item[0] == OTHER, item[0])):
                spent = sum(row["seconds"] for row in rows)
                bounds = [f"{100 * sum(row[bound] for row in rows) / spent:.0f}" for bound in BOUNDS if kind != OTHER]
                name = f"{network['network'].replace('-', ', ')} %, {network['kind']}"
                cells.append([name, run["machine"]["processor"], kind, f"{1e3 * spent:.2f}", *(bounds or [""] * 3)])
    header = ["network", "processor", "layers", "ms", "peak, %", "instructions, %", "second cache, %"]
    return section("### What the kernels reach", LIMITS, markdown(header, cells))


OTHER = "copies, means, linear"
BOUNDS = ("peak", "near", "L2")
LIMITS = """`benchmarks/speed/kernel_limits.py` times each layer on one thread. It compares the time with three lower
limits, and the table gives each limit in percent of the time. "peak": the time of the layer's multiply-adds (with those
of the padding) at the rate that the core reaches between registers. "instructions": the time of the same kernel when
all its inputs lie in the first cache, so that nothing waits for memory. "second cache": the time to read the inputs of
its weights at the rate of the second cache, where the inputs of most layers lie. The larger of the last two is what
this kind of kernel can reach at most."""


@table("int8-accuracy", SPARSE_EXECUTION)
def int8_accuracy() -> str:
    """Return accuracy, bytes and milliseconds of trained networks in float32 and on 8-bit integers."""
    (runs,) = results("int8_accuracy.json")
    rows = []
    for name, run in runs.items():
        for kind in run["accuracy"]:
            error = run["relative_error"].get(kind)
            rows.append(
                [
                    f"{name}: {run['network']}, {100 * run['sparsity']:.1f} % zeros",
                    kind if kind == "float32" else f"int8, {kind}",
                    f"{100 * run['accuracy'][kind]:.2f}",
                    "" if error is None else f"{100 * error:.2f}",
                    f"{run['bytes'][kind]:,}",
                    f"{run['milliseconds'][kind]:.3f}",
                    f"{run['machine']['processor']}, {counted(run['machine']['threads'])}",
                ]
            )
    header = ["run, network", "numbers", "accuracy, %", "error of the outputs, %", "bytes saved", "ms", "processor"]
    return markdown(header, rows)
