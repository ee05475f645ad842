"""The Hugging Face Trainer: a small language model with 80 % zeros, on the bytes of a text.

python examples/hf_trainer.py
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from str_triton import Target, densify, sparsify
from str_triton.integrations.transformers import BudgetCallback

set_seed(0)
text = torch.tensor([min(byte, 127) for byte in Path(argparse.__file__).read_bytes()])  # a text that everybody has
blocks = text[: len(text) // 64 * 64].reshape(-1, 64)
data = [{"input_ids": block, "labels": block} for block in blocks]

model = GPT2LMHeadModel(
    GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
)
sparsify(model, exclude=["*wpe"])  # the embedding of tokens and the head are one weight, which counts once
arguments = TrainingArguments(
    "hf_run",
    max_steps=40,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=20,
    save_steps=20,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,  # leave it out to train on a GPU
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data[:-32],
    eval_dataset=data[-32:],
    callbacks=[BudgetCallback(Target(sparsity=0.8))],
)
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint, in equal bits
print(f"loss {trainer.evaluate()['eval_loss']:.2f}, {trainer.state.log_history[-1]['sparsity']:.1%} zeros")

densify(model).save_pretrained("hf_sparse")  # a plain GPT-2, with zeros
again = GPT2LMHeadModel.from_pretrained("hf_sparse")
