"""A callback for the Hugging Face Trainer."""

import base64
import io
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from str_triton import RankTarget, Target
from str_triton.integrations.control import controller_for

KEY = "str_triton"  # of the controller's state in trainer_state.json


class BudgetCallback(TrainerCallback):
    """A callback with which `transformers.Trainer` meets an exact budget; the arguments are those of the controllers.

        sparsify(model)
        callback = BudgetCallback(Target(sparsity=0.9))
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    A model that is evaluated or saved during training costs exactly what the schedule says. At the end it costs what
    the target says. The controller's state is in the checkpoint's trainer_state.json, so a resumed training gives the
    same bits. The logs get "sparsity" or "total_rank".
    """

    def __init__(self, target: Target | RankTarget, **options: Any) -> None:
        self.target, self.options = target, options
        self._model: nn.Module | None = None
        self._exact = ExitStack()

    def _control(self, model: nn.Module) -> None:
        self._model, self.controller = model, controller_for(model, self.target, self.options)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._control(rest["model"])  # before DistributedDataParallel or FSDP wraps it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        if not any(module is self._model for module in rest["model"].modules()):  # model_init, add_callback
            self._control(rest["model"])
        states = _states_of_callbacks(state)
        if KEY in states:
            saved = io.BytesIO(base64.b64decode(states[KEY]))
            self.controller.load_state_dict(torch.load(saved))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._exact.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.controller.step(state.global_step / state.max_steps)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Make the model exact if the Trainer is about to evaluate or save it; also called at the end of a step."""
        if control.should_evaluate or control.should_save:
            self._exact.enter_context(self.controller.exact())
            buffer = io.BytesIO()
            torch.save(self.controller.state_dict(), buffer)
            _states_of_callbacks(state)[KEY] = base64.b64encode(buffer.getvalue()).decode()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if "train_runtime" in rest["logs"]:  # the last log; the Trainer may load its best checkpoint next
            self._exact.close()
        for logs in (rest["logs"], state.log_history[-1]):
            logs.update(self.controller.measure())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._exact.close()
        self.controller.finish()


def _states_of_callbacks(state: TrainerState) -> dict[str, str]:
    """Return the callbacks' entries of trainer_state.json: a dictionary, which TrainerState makes from its list."""
    return cast("dict[str, str]", state.stateful_callbacks)
