"""Trial with transformers: small models to 90 % by its Trainer, with checkpoints, resumed, saved, loaded and densified.

    pip install transformers accelerate; python -m benchmarks.speed.transformers_models [NAME ...]

The models are made from configurations; nothing is downloaded. All their matrices but the ones excluded by name are
sparsified. Ends with an AssertionError where something does not hold.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn

from str_triton import SparsityController, Target, densify, plain_state_dict, sparsify
from str_triton.nn import matrices, thresholded_weights

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
STEPS, SAVE = 20, 10


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def mixtral() -> nn.Module:
    """Return a Mixtral whose weights are saved under the names that they have in memory.

    By default transformers 5 splits the experts for saving, and its Trainer does not find them again when it resumes,
    in a plain model neither.
    """
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    model._weight_conversions = []
    return model


# What makes each model, and what is excluded and added by name.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (bert, {"exclude": ["*position_embeddings", "*token_type_embeddings"]}),
    "gpt2": (gpt2, {"exclude": ["*wpe"]}),
    "llama": (llama, {}),
    "mixtral": (mixtral, {"exclude": ["*gate.weight"], "parameters": ["*experts*"]}),
}


class Steps(transformers.TrainerCallback):
    """Drives a controller by a Trainer, and keeps its state in the Trainer's checkpoints."""

    def __init__(self, controller: SparsityController) -> None:
        self.controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step:
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}", "controller.pt")
            self.controller.load_state_dict(torch.load(saved))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.controller.step(state.global_step / state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        torch.save(self.controller.state_dict(), folder / "controller.pt")


def weights(model: nn.Module) -> Iterable:
    """Return the thresholded weights, a shared one once."""
    return {id(weight.dense): weight for weight in thresholded_weights(model)}.values()


def sparse(name: str) -> tuple[nn.Module, SparsityController, int]:
    """Return a sparsified model, its controller, and how many thresholded weights are to survive: a tenth."""
    torch.manual_seed(0)
    build, options = MODELS[name]
    model = sparsify(build(), **options)
    keep = sum(weight.dense.numel() for weight in weights(model)) // 10
    left = [matrix for matrix in matrices(model) if matrix.excluded]
    assert all(matrix.covered or matrix.excluded for matrix in matrices(model))
    controller = SparsityController(model, Target(nonzeros=keep + sum(m.value.numel() for m in left if m.covered)))
    return model, controller, keep


def train(model: nn.Module, controller: SparsityController, folder: str, resume: str | None = None) -> None:
    rows = torch.randint(128, (80, 16), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=4, max_steps=STEPS, save_steps=SAVE, report_to=[], use_cpu=True,
        logging_steps=STEPS, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Steps(controller)])
    trainer.train(resume_from_checkpoint=resume)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(16)[None]).logits


def trial(name: str, folder: str) -> None:
    model, controller, keep = sparse(name)
    train(model, controller, folder)
    kept = sum(int(weight.sparse.count_nonzero()) for weight in weights(model))
    assert kept == keep, (kept, keep)

    resumed, its_controller, _ = sparse(name)
    train(resumed, its_controller, folder, resume=f"{folder}/checkpoint-{SAVE}")
    assert equal(resumed.state_dict(), model.state_dict())

    expected = logits(model.requires_grad_(False))
    model.save_pretrained(f"{folder}/sparse")
    state = safetensors.torch.load_file(f"{folder}/sparse/model.safetensors")
    loaded, _, _ = sparse(name)
    assert not loaded.load_state_dict(state, strict=False).unexpected_keys
    loaded.tie_weights()  # The file has one name of each tied weight.
    assert torch.equal(logits(loaded.requires_grad_(False)), expected)
    try:
        type(model).from_pretrained(f"{folder}/sparse")
    except RuntimeError:
        pass
    else:
        raise AssertionError("a plain model has read a sparsified one")
    plain = MODELS[name][0]()
    plain.load_state_dict(plain_state_dict(state), strict=False)
    assert torch.equal(logits(plain.requires_grad_(False)), expected)

    densify(model).save_pretrained(f"{folder}/dense")
    assert torch.equal(logits(model), expected)
    again = type(model).from_pretrained(f"{folder}/dense").requires_grad_(False)
    assert torch.equal(logits(again), expected)
    print(f"{name}: {kept:,} of {sum(p.numel() for p in again.parameters() if p.dim() > 1):,} weights, equal logits")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for each in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as directory:
            trial(each, directory)
