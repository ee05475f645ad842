"""Tables of speed: ops, layers, a training step."""

from benchmarks.tables.documents import markdown, results, table


@table("soft-threshold")
def soft_threshold() -> str:
    """Return the times of the op, of the literal formula and of a copy, by shape."""
    rows = []
    for run in results("soft_threshold_*.json"):
        for shape, figures in run["soft_threshold"].items():
            for gradient in ("masked", "straight_through"):
                literal = "literal" if gradient == "masked" else f"literal_{gradient}"
                rows.append(
                    [
                        f"{shape}, {gradient.replace('_', '-')}",
                        f"{figures[f'{gradient}_ms']:.2f}",
                        f"{figures[f'{literal}_ms']:.2f}",
                        f"{figures[f'{gradient}_speedup']:.2f}",
                        f"{100 * figures[f'{gradient}_share_of_copy']:.0f}",
                    ]
                )
    return markdown(["shape, gradient", "ms", "formula, ms", "times faster", "% of a copy's bytes/s"], rows)


@table("training-step")
def training_step() -> str:
    """Return the time of a training step relative to the dense network's, by machine."""
    rows = []
    for run in results("training_step_*.json"):
        machine = run["machine"]
        device = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
        for name, seconds in run["seconds"].items():
            ratio = f"{run['ratio_to_dense'][name]:.3f}"
            rows.append([f"{name}, {device}", f"{1e3 * seconds:.1f}", ratio])
        solve, share = f"{1e3 * run['solve_seconds']:.1f}", f"{run['solve_share_of_dense_step']:.3f}"
        rows.append([f"a solve, every {run['solve_interval']} steps, {device}", solve, f"{share} a step"])
    return markdown(["ResNet-50, forward, backward and SGD", "ms", "x dense"], rows)


@table("cifar-speed")
def cifar_speed() -> str:
    """Return the training speed of ResNet20 with each option, and the share of the speed of a matrix product."""
    rows = []
    for run in results("cifar_speed*.json"):
        for name, figures in run["variants"].items():
            speed, share = f"{figures['images_per_second']:.0f}", f"{100 * figures['share_of_product']:.0f}"
            rows.append([f"{name}, {run['machine']['processor']}", speed, share])
    return markdown(["ResNet20, 32x32, batch 128", "images a CPU second", "% of a matrix product's FLOP/s"], rows)


@table("low-rank-rnn")
def low_rank_rnn() -> str:
    """Return the times of the recurrent layers relative to torch's, by machine."""
    rows = []
    for run in results("low_rank_rnn_cpu.json"):
        device = f"{run['machine']['processor']}, {run['machine']['threads']} threads"
        for row in run["rows"]:
            kind = "training step" if row["training"] else "inference"
            name = f"{row['cell'].upper().replace('FAST', 'Fast')}, {kind}, batch {row['batch_size']}, {device}"
            sizes = [f"{row['hidden_size']}", f"{row['rank']}"]
            times = [f"{row['ours_ms']:.1f}", f"{row['torch_ms']:.1f}", f"{row['torch_over_ours']:.2f}"]
            rows.append([name, *sizes, *times])
    return markdown(["cell", "hidden size", "rank", "ms", "torch, ms", "times faster"], rows)


@table("current-rank")
def current_rank() -> str:
    """Return how many times faster a training step is with the columns that the threshold leaves."""
    rows = []
    for run in results("current_rank_cpu.json"):
        for row in run["rows"]:
            name = f"{row['layer']}, batch {row['batch_size']}, {row['steps']} steps, {run['machine']['processor']}"
            rows.append([name, str(row["hidden_size"]), str(row["rank"]), f"{row['times_faster']:.2f}"])
    return markdown(["layer", "hidden size", "rank left", "times faster"], rows)
