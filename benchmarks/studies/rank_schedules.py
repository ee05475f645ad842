"""When ranks should fall, and what a threshold should compare: schedules and distributions on text.

    python -m benchmarks.studies.rank_schedules [--seeds 0 1]

Each run is that of str-exact in `learned_rank` on text, at a third of the dense parameters and four times the base
learning rate; only the options of the controller differ. Judged by the loss on validation data; the test data take no
part. A line per run is appended to benchmarks/results/rank_schedules.jsonl; runs that it already holds are skipped.
"""

import argparse
from typing import Any
from unittest.mock import patch

from benchmarks.runs import RunFile
from benchmarks.studies import learned_rank
from benchmarks.timing import RESULTS
from str_triton import RankController
from str_triton.rnn import methods

RUNS = RunFile(RESULTS / "rank_schedules.jsonl", ("schedule", "begin", "end", "distribution", "seed"))
COMPRESSION, RATE = 3.0, 4.0
SCHEDULES = (("linear", 0.0, 0.3), ("cubic", 0.0, 0.5), ("constant", 0.3, 0.3), ("linear", 0.0, 0.5))
KEPT = ("validation_loss", "ranks", "params", "seconds")


def run(key: dict[str, Any]) -> dict[str, Any]:
    """Train once with the options of the controller that `key` names."""
    jobs = learned_rank.jobs("text", [COMPRESSION], [key["seed"]])
    job = next(job for job in jobs if job["method"] == "str-exact") | {"rate": RATE}
    options = {name: key[name] for name in ("schedule", "begin", "end", "distribution")}

    def controller(*args: Any, **given: Any) -> RankController:
        return RankController(*args, **given | options)

    with patch.object(methods, "RankController", controller):
        result = learned_rank.run(job)
    return {**key, **{name: result[name] for name in KEPT}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    seeds = parser.parse_args().seeds
    wanted = [
        {"schedule": schedule, "begin": begin, "end": end, "distribution": distribution, "seed": seed}
        for schedule, begin, end in SCHEDULES
        for distribution in ("relative", "fixed")
        for seed in seeds
    ]
    for key in RUNS.missing(wanted):
        result = run(key)
        RUNS.append(result)
        print(result, flush=True)


if __name__ == "__main__":
    main()
