"""The studies of ranks: the order of the runs, the choice of the rate, resuming, and the tables."""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs import RunFile, at_its_rate
from benchmarks.studies import har_ranks, rank_runs, speech_ranks
from benchmarks.studies.rank_runs import best_rate, key
from benchmarks.tables import ranks as tables_ranks
from str_triton.rnn.train import COMMAND_LINE


def line(job: dict[str, Any], accuracy: float, **more: Any) -> dict[str, Any]:
    return {"job": job, "accuracy": accuracy - 0.1, "validation_accuracy": accuracy, "params": 9, **more}


def test_every_job_of_a_study_is_another_run_or_one_that_is_done() -> None:
    rated = list(har_ranks.jobs([], 60))[:15]
    assert [(job["rate"], job["method"]) for job in rated] == list(product(har_ranks.RATES, har_ranks.METHODS))
    assert rated[0]["arguments"][-2:] == ["--target-params", "2324"]  # 80 x 9 dense, rank 8 (80 + 80), the other 324
    assert rated[1]["arguments"][-2:] == ["--ranks", "9,8"]
    done = [line(job, 0.9 if job["rate"] == 2e-2 and job["method"] == "fixed" else 0.5) for job in rated]
    later = list(har_ranks.jobs(done, 60))
    assert {key(job) for job in rated} < {key(job) for job in later}
    longer = list(har_ranks.jobs(done, 300))
    for leaders in (later[15:24], longer[:9]):
        assert [(job["seed"], job["method"]) for job in leaders] == list(product(har_ranks.SEEDS, har_ranks.LEADERS))
    for job in (*later[15:], *longer):
        assert job["rate"] == (2e-2 if job["method"] == "fixed" else 1e-2)


def test_har_with_six_classes_has_runs_of_its_own() -> None:
    first = list(har_ranks.jobs_of_six([], ["gru", "lstm"], 30))
    assert [(job["cell"], job["method"]) for job in first[:8]] == list(product(("gru", "lstm"), har_ranks.METHODS[:4]))
    assert len({key(job) for job in first}) == 2 * 4 * (3 + 2)
    done = [line(job, 0.9 if job["rate"] == 3e-3 and job["cell"] == "lstm" else 0.5) for job in first[:24]]
    later = {(job["cell"], job["rate"]) for job in list(har_ranks.jobs_of_six(done, ["gru", "lstm"], 30))[24:]}
    assert later == {("gru", 1e-2), ("lstm", 3e-3)}
    for job in first[:8]:
        config = COMMAND_LINE.read(job["arguments"])
        assert (config.classes, config.cell, config.method) == (6, job["cell"], job["method"])
        assert config.target_compression == job["compression"]


def test_networks_of_the_speech_study_have_the_parameters_of_their_compression() -> None:
    size = speech_ranks.small_hidden_size("gru", 3.0)
    whole, small = (rank_runs.params_at(speech_ranks.replace(speech_ranks.WHOLE, hidden_size=n)) for n in (96, size))
    assert whole / 3.2 < small <= whole / 3
    assert rank_runs.params_at(speech_ranks.replace(speech_ranks.WHOLE, hidden_size=size + 1)) > whole / 3


def test_the_rate_is_the_best_on_validation_data_and_the_first_without_any() -> None:
    jobs = [har_ranks.job("fixed", (9, 8), 0, rate, 60) for rate in (1e-2, 3e-3)]
    assert best_rate([], jobs) == 1e-2
    assert best_rate([line(jobs[0], 0.7), line(jobs[1], 0.8)], jobs) == 3e-3
    equal = [line(job, 0.8) for job in jobs]
    other = [
        line(har_ranks.job("fixed", (9, 8), 1, rate, 60), accuracy) for rate, accuracy in ((1e-2, 0.6), (3e-3, 0.7))
    ]
    clipped = line(har_ranks.job("fixed", (9, 8), 1, 1e-2, 60, 1.0), 0.9)
    assert best_rate(equal, jobs) == 1e-2
    assert best_rate([*equal, *other, clipped], jobs) == 3e-3


def test_a_study_goes_on_where_a_kill_has_cut_it_off(tmp_path: Path) -> None:
    small = ["--no-bidirectional", "--epochs", "2", "--batch-size", "108", "--hidden-size", "6"]
    jobs = [
        {"data": "vowels", "method": method, "seed": 0, "epochs": 2, "rate": 1e-2}
        | {"arguments": ["japanese-vowels-gru", "--method", method, "--choose", "validation", *small]}
        for method in ("dense", "str-exact")
    ]
    jobs[1]["arguments"] += ["--target-rank", "4"]
    out = tmp_path / "runs.jsonl"
    out.write_text(json.dumps(line(jobs[0], 0.5)) + "\n" + '{"job": {"da')
    args = argparse.Namespace(out=out, work=tmp_path / "work", lock=tmp_path / "lock", list=False)
    args.data = "japanese-vowels"
    rank_runs.do(lambda done: jobs, args)
    rank_runs.do(lambda done: jobs, args)
    _, second = RunFile(out).read()
    assert len(out.read_text().splitlines()) == 2
    assert key(second["job"]) == key(jobs[1])
    assert sum(second["ranks"].values()) == 4
    assert second["multiply_adds"] < second["int8_weight_bytes"] < 2 * second["params"]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["har_ranks", "speech_ranks"])
def test_a_table_shows_the_runs_at_the_chosen_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "har_ranks":
        jobs = [har_ranks.job("fixed", (9, 8), *pair, 60) for pair in ((0, 1e-2), (0, 3e-3), (1, 3e-3))]
        jobs.append(har_ranks.job("fixed", (8, 7), 0, 3e-3, 60))
    else:
        jobs = [speech_ranks.job("gru", "fixed", 3.0, *pair, 30) for pair in ((0, 1e-2), (0, 3e-3), (1, 3e-3))]
        jobs.append(speech_ranks.job("gru", "fixed", 6.0, 0, 3e-3, 30))
    more = {"ranks": {"w": 9, "u": 8}, "multiply_adds": 7, "int8_weight_bytes": 8}
    runs = [line(job, accuracy, **more) for job, accuracy in zip(jobs, (0.7, 0.8, 0.9, 0.6), strict=True)]
    monkeypatch.setattr(tables_ranks, "lines", lambda file: runs)
    text = getattr(tables_ranks, name)().replace("\N{NO-BREAK SPACE}", " ")
    (row,) = [row for row in text.splitlines() if "75.00 ± 7.07" in row]
    assert "85.00 ± 7.07" in row
    assert text.count("0.003 of 2") == 2  # the other size takes the rate that was chosen at the first
    assert "not measured" in text


def test_equal_rates_are_told_apart_by_all_their_seeds() -> None:
    jobs = [speech_ranks.job("gru", "fixed", 3.0, seed, rate, 30) for seed in (0, 1) for rate in (1e-2, 5e-3)]
    runs = [line(job, accuracy) for job, accuracy in zip(jobs, (0.8, 0.8, 0.9, 0.91), strict=True)]
    assert at_its_rate(runs) == [runs[1], runs[3]]


def test_the_table_of_another_number_of_epochs_has_only_the_rows_that_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [har_ranks.job("fixed", (9, 8), seed, 1e-2, epochs) for seed, epochs in ((0, 60), (1, 60), (0, 300))]
    jobs.append(har_ranks.job("fixed", (9, 8), 0, 1e-2, 60, max_norm=1.0))
    runs = [line(job, 0.8, ranks={"w": 9, "u": 8}) for job in jobs]
    monkeypatch.setattr(tables_ranks, "lines", lambda file: runs)
    first, *others = tables_ranks.har_ranks().split("| method; ")[1:]
    assert first.startswith("60 epochs |")
    assert [other.split(" |")[0] for other in others] == ["60 epochs, gradients clipped", "300 epochs"]
    assert "not measured" in first
    for other in others:
        assert other.count("size of") == other.count("one seed") == 1
