"""README's table: a row for each study on real data, with the default method beside the best of the others."""

from collections.abc import Callable
from operator import itemgetter
from statistics import mean

from benchmarks.runs import RunFile, at_its_rate
from benchmarks.tables.documents import NONE, README, NotMeasured, Run, lines, markdown, seeds, spread, table
from benchmarks.tables.photographs import deployed, epochs_of
from benchmarks.tables.ranks import main_study, studies
from benchmarks.timing import RESULTS

OURS = "str-exact"
TEACHER = ", teacher"  # the end of a line of the studies on photographs
LONGER = ", 16 epochs"  # the end of a line of the study on Caltech-101
FROM_DENSE = ", from dense"  # the end of a line of the study on CIFAR-10, before `TEACHER`
THIRD = 3.0  # compression of the studies of ranks
Runs = dict[str, list[Run]]  # by method


@table("real-data", README)
def real_data() -> str:
    """Return a row for each study that has runs."""
    rows = []
    for make in (caltech, taught, taught_longer, cifar, cifar_from_dense, speech, har_six, har_two):
        try:
            rows.append(make())
        except NotMeasured:
            continue
    if not rows:
        raise NotMeasured("no study on real data")
    header = ["data, network, target", "dense %", "str-exact %", "best other method %", "seeds", "with str-exact"]
    return markdown(header, rows)


def caltech() -> list[str]:
    """Return the row of MobileNetV1 on Caltech-101."""
    runs = [run for run in caltech_runs() if TEACHER not in run["line"]]
    return caltech_row("Caltech-101 (a part), MobileNetV1 fine-tuned, 90 % zeros", runs)


def taught() -> list[str]:
    """Return the row of the networks that also learned the scores of the dense one."""
    runs = [run for run in caltech_runs() if run["line"] == "dense" or run["line"].endswith(TEACHER)]
    return caltech_row("the same, both sparse networks with the dense one as teacher", runs)


def taught_longer() -> list[str]:
    """Return the row with 16 epochs for the dense network and for the sparse ones, which have its teacher's scores."""
    runs = [{**run, "line": run["line"].removesuffix(LONGER)} for run in caltech_runs(LONGER)]
    kept = [run for run in runs if run["line"] == "dense" or run["line"].endswith(TEACHER)]
    return caltech_row("the same with 16 epochs each; the teacher has 8", kept, LONGER)


def caltech_runs(epochs: str = "") -> list[Run]:
    """Return the runs on Caltech-101 with the usual number of epochs, or those whose lines end with ``epochs``."""
    runs = [run for run in lines("caltech.jsonl") if run["target"] in ("", "0.9")]
    return [run for run in runs if (run["line"].endswith(epochs) if epochs else "epochs" not in run["line"])]


def caltech_row(name: str, runs: list[Run], epochs: str = "") -> list[str]:
    """Return the row of some runs on Caltech-101, whose lines in the results end with ``epochs``."""
    use = deployed(RunFile(RESULTS / "caltech_deploy.jsonl").read())
    ours = next((run["line"] for run in runs if run["line"].removesuffix(TEACHER) == OURS), OURS)
    own, dense = use.get(("0.9", ours + epochs)), use.get(("", "dense"))
    gain = NONE
    if own and dense:
        gain = f"{own['bytes'] / 1e6:.1f} of {dense['bytes'] / 1e6:.1f} MB, {own['ms']:.1f} of {own['dense_ms']:.1f} ms"
    return row(name, by_method(runs, lambda run: run["line"].removesuffix(TEACHER)), gain)


def cifar() -> list[str]:
    """Return the row of ResNet20 on CIFAR-10."""
    runs = [run for run in cifar_runs() if FROM_DENSE not in run["line"] and TEACHER not in run["line"]]
    return cifar_row(f"CIFAR-10 as JPEG, ResNet20, {epochs_of(runs)} epochs, 90 % zeros", runs)


def cifar_from_dense() -> list[str]:
    """Return the row of networks that start from the dense one, which also teaches the sparse ones."""
    ends = (f"dense{FROM_DENSE}", FROM_DENSE + TEACHER)
    started = [run for run in cifar_runs() if run["line"].endswith(ends)]
    runs = [{**run, "line": run["line"].removesuffix(TEACHER).removesuffix(FROM_DENSE)} for run in started]
    name = f"the same, {epochs_of(runs)} more epochs from the dense network, which also teaches the sparse ones"
    return cifar_row(name, runs)


def cifar_runs() -> list[Run]:
    """Return the runs of ResNet20 at 90 % and the dense ones."""
    runs = [run for run in lines("cifar.jsonl") if run["model"] == "resnet20"]
    return [run for run in runs if run["target"] == 0.9 or run["line"].startswith("dense")]


def cifar_row(name: str, runs: list[Run]) -> list[str]:
    """Return the row of some runs on CIFAR-10, whose lines are methods."""
    methods = by_method(runs, itemgetter("line"))
    gain = f"{100 * mean(r['flops'] for r in methods[OURS]):.0f} % of the FLOPs" if OURS in methods else NONE
    return row(name, methods, gain)


def speech() -> list[str]:
    """Return the row of the GRU on speech."""
    runs = main_study("speech_ranks.jsonl", "speech5")
    return ranks_row("Speech Commands (five words), GRU, a third of the parameters", runs)


def har_six() -> list[str]:
    """Return the row of the GRU on HAR-6."""
    return ranks_row("HAR-6 (reconstructed), GRU, a third of the parameters", main_study("har_ranks.jsonl", "har6"))


def ranks_row(name: str, runs: list[Run]) -> list[str]:
    """Return the row of a study with several cells and compressions: the GRU at a third of the parameters."""
    runs = [run for run in runs if run["job"]["cell"] == "gru" and run["job"]["compression"] in (None, THIRD)]
    return row(name, tuned(runs), parameters(tuned(runs)))


def har_two() -> list[str]:
    """Return the row of FastGRNN on HAR-2, each method with clipped gradients or without: as validation data say."""
    main, *others = studies("har_ranks.jsonl", "har2")
    methods: Runs = {}
    for study in (main, *others):
        if study[0]["job"]["epochs"] == main[0]["job"]["epochs"]:
            own = [run for run in study if run["job"]["ranks"] in (None, "9,8")]
            for method, found in tuned(
                [run for run in own if run["job"]["method"] != "str"]
            ).items():  # it has no target
                methods[method] = max(methods.get(method, found), found, key=validation)
    return row("HAR-2 (reconstructed), FastGRNN, the size of ranks 9 and 8", methods, parameters(methods))


def validation(runs: list[Run]) -> float:
    """Return the mean validation accuracy of some runs."""
    return mean(run["validation_accuracy"] for run in runs)


def by_method(runs: list[Run], method_of: Callable[[Run], str]) -> Runs:
    """Return the runs by their method."""
    methods: Runs = {}
    for run in runs:
        methods.setdefault(method_of(run), []).append(run)
    return methods


def tuned(runs: list[Run]) -> Runs:
    """Return the runs of studies of ranks by their method, at the method's learning rate."""
    methods = by_method(runs, lambda run: run["job"]["method"])
    return {method: at_its_rate(own) for method, own in methods.items()}


def parameters(methods: Runs) -> str:
    """Return the parameters of str-exact and of the dense network."""
    if OURS not in methods:
        return NONE
    own, dense = (mean(run[key] for run in methods[OURS]) for key in ("params", "dense_params"))
    return f"{own:,.0f} of {dense:,.0f} parameters"


def row(name: str, methods: Runs, gain: str) -> list[str]:
    """Return the cells of a study. Raise NotMeasured unless it has runs of str-exact and of the dense network."""
    if not {OURS, "dense"} <= methods.keys():
        raise NotMeasured(name)
    others = {method: runs for method, runs in methods.items() if not method.startswith(("dense", OURS))}
    best = max(others, key=lambda method: mean(run["accuracy"] for run in others[method]), default=None)
    shown = [methods["dense"], methods[OURS], others.get(best, [])]
    cells = [spread((run["accuracy"] for run in runs), 100) if runs else NONE for runs in shown]
    cells[2] += f" ({best})" if best else ""
    return [name, *cells, seeds_of([len(runs) for runs in shown if runs]), gain]


def seeds_of(numbers: list[int]) -> str:
    """Return the number of seeds of the networks in a row, or a number for each if they differ."""
    return seeds(numbers[0]) if len(set(numbers)) == 1 else ", ".join(map(str, numbers))
