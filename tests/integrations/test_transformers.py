"""The callback for the Hugging Face Trainer, by the real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from str_triton import LowRankLinear, RankTarget, Target, count_ranks, plain_state_dict, sparsify
from tests.processes import rank, run_job

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
from str_triton.integrations.transformers import BudgetCallback  # noqa: E402

STEPS = 8
DATA = [
    {"x": x, "labels": label} for x, label in zip(torch.randn(64, 12), torch.randint(3, (64,)), strict=True)
]  # fmt: skip
LINEAR = {"schedule": "linear", "end": 1.0, "interval": 3}


class Network(nn.Module):
    def __init__(self, layer: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(layer(12, 20), nn.ReLU(), layer(20, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


WEIGHTS = 12 * 20 + 20 * 3
ZEROS = round(0.8 * WEIGHTS)


def llama() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    return sparsify(transformers.LlamaForCausalLM(config))


def trainer(folder: Path, model: nn.Module | None, *callbacks: Any, data: Any = DATA, **options: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.01, "weight_decay": 0.1, "save_strategy": "no",
    }  # fmt: skip
    init = options.pop("model_init", None)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments | options),
        model_init=init,
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=list(callbacks),
    )


def zeros(state: dict[str, Tensor]) -> int:
    """Return the zeros of the weights in a sparsified model's state dict."""
    return sum(int((value == 0).sum()) for value in plain_state_dict(state).values() if value.dim() > 1)


class Watch(transformers.TrainerCallback):
    """Counts the zeros of the model that is evaluated."""

    def __init__(self) -> None:
        self.zeros: dict[int, set[int]] = {}

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: nn.Module, **rest: Any) -> None:
        self.zeros.setdefault(state.global_step, set()).add(zeros(model.state_dict()))


def test_what_is_evaluated_logged_and_saved_costs_what_the_schedule_says(tmp_path: Path) -> None:
    watch, model = Watch(), sparsify(Network())
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    run = trainer(
        tmp_path, model, BudgetCallback(Target(sparsity=0.8), **LINEAR), watch, gradient_accumulation_steps=2, **options
    )
    run.train()
    due = {step: round(step / STEPS * ZEROS) for step in range(2, STEPS + 1, 2)}
    assert watch.zeros == {step: {number} for step, number in due.items()}
    logged = {log["step"]: log["sparsity"] for log in run.state.log_history if "eval_loss" in log}
    assert logged == {step: pytest.approx(number / WEIGHTS) for step, number in due.items()}
    assert all("sparsity" in log for log in run.state.log_history)
    for step in (4, 8):
        assert zeros(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")) == due[step]
    assert zeros(model.state_dict()) == ZEROS
    run.save_model(tmp_path / "final")
    assert zeros(load_file(tmp_path / "final" / "model.safetensors")) == ZEROS


def test_evaluation_and_checkpoints_do_not_change_the_training(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model = sparsify(Network())
        trainer(tmp_path, model, BudgetCallback(Target(sparsity=0.8), **LINEAR), **options).train()
        return model.state_dict()

    quiet = run()
    watched = run(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=3)
    assert all(torch.equal(quiet[key], watched[key]) for key in quiet)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_resumed_training_with_tied_embeddings_gives_the_same_bits(tmp_path: Path, strategy: str) -> None:
    rows = torch.randint(32, (16, 6))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {"data": data, "save_strategy": strategy, "save_steps": 4}

    def run(resume: str | None) -> dict[str, Tensor]:
        model = llama()
        callback = BudgetCallback(Target(sparsity=0.8), distribution="learned", **LINEAR)
        trainer(tmp_path, model, callback, **options).train(resume_from_checkpoint=resume)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return model.state_dict() | dict(enumerate(callback.controller.state_dict()["raw_thresholds"]))

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-4"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_best_model_is_finished_when_it_is_loaded(tmp_path: Path) -> None:
    """Also where training stops early, and where the last evaluation is not followed by a checkpoint."""
    model = sparsify(Network())
    callbacks = BudgetCallback(Target(sparsity=0.8), **LINEAR), transformers.EarlyStoppingCallback(1)
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 0.1,
    }  # fmt: skip
    run = trainer(tmp_path, model, *callbacks, **options)
    run.train()
    assert run.state.global_step < STEPS
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(model.body[0].bias, best["body.0.bias"])
    assert zeros(model.state_dict()) == ZEROS > zeros(best)


def test_a_model_made_for_each_training_gets_a_controller(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, None, BudgetCallback(Target(sparsity=0.8)), model_init=lambda: sparsify(Network()), max_steps=2
    )
    run.train()
    assert zeros(run.model.state_dict()) == ZEROS


def test_ranks_are_met(tmp_path: Path) -> None:
    model = Network(LowRankLinear)
    run = trainer(tmp_path, model, BudgetCallback(RankTarget(total_rank=6)))
    run.train()
    assert count_ranks(model).total_rank == run.state.log_history[-1]["total_rank"] == 6


def test_another_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float"):
        trainer(tmp_path, sparsify(Network()), BudgetCallback(0.9))


def train_on_two(folder: Path) -> int:
    model = sparsify(Network())
    run = trainer(folder, model, BudgetCallback(Target(sparsity=0.8), interval=3), save_strategy="steps", save_steps=4)
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    again = sparsify(Network())
    resumed = trainer(folder, again, BudgetCallback(Target(sparsity=0.8), interval=3))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    torch.save(model.state_dict(), folder / f"{rank()}.pt")
    return 0


def test_two_processes_train_and_resume_the_same_model(tmp_path: Path) -> None:
    job = run_job(tmp_path, train_on_two, tmp_path)
    assert job.codes == [0, 0], job.err
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert zeros(first) == ZEROS
