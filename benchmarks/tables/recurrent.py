"""Tables about compiled recurrent layers beside other engines."""

from statistics import geometric_mean
from typing import Any

from benchmarks.tables.documents import counted, markdown, paragraph, results, table

DENSE = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}
OURS = {"ours_r8": "rank H/8", "ours_r16": "rank H/16"}
LARGE = 256  # hidden units from which on twice the speed of the dense engines is the goal
EQUAL = 0.95  # a ratio of times above this counts as equal

Row = dict[str, Any]


@table("recurrent-inference")
def recurrent_inference() -> str:
    """Return the times of compiled recurrent layers and of dense engines, and a summary of the ratios."""
    parts = []
    for run in results("recurrent_inference.json"):
        rows = run["rows"]
        names = [name for name in DENSE if all(name in row["ms"] for row in rows)]
        others = {"torch": "torch", **{name: DENSE[name] for name in names}}
        if all("ours_r8_int8" in row["ms"] for row in rows):
            others |= {"ours_r8_int8": "rank H/8, int8", "torch_int8": "torch, int8"}
        cells = []
        for row in rows:
            case = f"{row['cell'].upper()} {row['hidden']}, batch {row['batch']}, {counted(row['threads'])}"
            ours = [f"{row['ms'][name]:.2f} ({_ratio(row, name, names):.2f}x)" for name in OURS]
            cells.append([case, *ours, *(f"{row['ms'][name]:.2f}" for name in others)])
        header = [f"{run['machine']['processor']}, ms", *OURS.values(), *others.values()]
        parts.append(f"{paragraph(_summary(run, names))}\n\n{markdown(header, cells)}")
    return "\n\n".join(parts)


def _ratio(row: Row, ours: str, names: list[str]) -> float:
    """Return the time of the fastest dense engine over ours."""
    return min(row["ms"][name] for name in names) / row["ms"][ours]


def _summary(run: dict[str, Any], names: list[str]) -> str:
    """Return sentences about the slowest cases, and about a streaming step."""
    found = {(case["cell"], case["hidden"], case["batch"], case["threads"], ours): _ratio(case, ours, names)
             for case in run["rows"] for ours in OURS}  # fmt: skip
    slower = [key for key, ratio in found.items() if ratio < EQUAL]
    large = {key: ratio for key, ratio in found.items() if key[1] >= LARGE}
    engines = " and ".join(DENSE[name] for name in names)
    text = f"In brackets: how many times as fast str-triton is as the faster of {engines}, which use the dense matrix. "
    if slower:
        share = f"by more than {100 * (1 - EQUAL):.0f} %"
        cases = "; ".join(map(_name, slower))
        text += f"str-triton is slower {share} in {len(slower)} of {len(found)} cases: {cases}. "
    else:
        text += f"str-triton is never slower in the {len(found)} cases (least: {_least(found)}). "
    twice = sum(ratio >= 2 for ratio in large.values())
    text += (
        f"From {LARGE} hidden units on, it is at least {min(large.values()):.2f} times as fast ({_least(large)}), and "
        f"at least twice as fast in {twice} of {len(large)} cases. "
    )
    steps = ", ".join(f"{name} {us:.1f} us" for name, us in run["step_us"].items())
    return text + f"One streaming step of a GRU of 64 units, rank 8: {steps}."


def _least(found: dict[tuple, float]) -> str:
    key = min(found, key=found.__getitem__)
    return f"{_name(key)}: {found[key]:.2f}"


def _name(key: tuple) -> str:
    cell, hidden, batch, threads, ours = key
    return f"{cell.upper()} {hidden}, {OURS[ours]}, batch {batch}, {counted(threads)}"


@table("recurrent-execution")
def recurrent_execution() -> str:
    """Return how often, and how far, each way to choose an execution misses the faster one."""
    cells = []
    for run in results("recurrent_execution*.json"):
        for cell in dict.fromkeys(row["cell"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["cell"] == cell]
            for way in ("rules", "measured"):
                regrets = [row[f"{way}_regret"] for row in rows]
                missed = sum(regret > 1 / EQUAL for regret in regrets)
                sizes = f"{missed} of {len(rows)}"
                cells.append([run["machine"]["processor"], cell.upper(), way, sizes, f"{max(regrets):.2f}x"])
    return markdown(["processor", "layer", "choice by", "sizes more than 5 % slower", "slowest"], cells)


@table("recurrent-training")
def recurrent_training() -> str:
    """Return how much longer a training step takes by each execution than by the loop in C."""
    cells = []
    for run in results("recurrent_execution*.json"):
        rows = [row for row in run["rows"] if row["training"] and "native" in row]
        for cell, hidden in dict.fromkeys((row["cell"], row["hidden_size"]) for row in rows):
            own = [row for row in rows if (row["cell"], row["hidden_size"]) == (cell, hidden)]
            others = [kind for kind in ("loop", "dense") if kind in own[0]]
            ratios = [f"{geometric_mean(row[kind] / row['native'] for row in own):.2f}" for kind in others]
            ratios += ["-"] * (2 - len(others))  # There is no layer of torch's.
            first = sum(row["native"] <= min(row[kind] for kind in others) for row in own)
            name = f"{cell.upper()} {hidden}"
            cells.append([run["machine"]["processor"], name, *ratios, f"{first} of {len(own)}"])
    header = ["processor", "layer", "op's own loop", "torch's layer", "the loop in C is fastest"]
    return markdown(header, cells)
