"""A callback for Lightning's Trainer."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from str_triton import RankController, RankTarget, SparsityController, Target
from str_triton.integrations.control import controller_for


class BudgetCallback(Callback):
    """A callback with which `lightning.Trainer` meets an exact budget; the arguments are those of the controllers.

        callback = BudgetCallback(Target(sparsity=0.9))
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, data)

    The module sparsifies its layers in `__init__` or `configure_model`. A model that is validated or saved during
    training costs exactly what the schedule says. At the end it costs what the target says. The controller's state is
    in the checkpoint, so a resumed training gives the same bits. "sparsity" or "total_rank" is logged.
    """

    def __init__(self, target: Target | RankTarget, **options: Any) -> None:
        self.target, self.options = target, options
        self.controller: SparsityController | RankController | None = None
        self._state: dict[str, Any] = {}  # of the checkpoint that training goes on from
        self._exact = ExitStack()

    def _running(self) -> SparsityController | RankController:
        """Return the controller. Raises RuntimeError before a training has begun."""
        if self.controller is None:
            raise RuntimeError("the callback has no controller before Trainer.fit")
        return self.controller

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the controller before DistributedDataParallel wraps the module, and make `save_checkpoint` exact."""
        if stage != "fit":
            return
        self.controller = None  # of a training before
        if not is_overridden("configure_model", pl_module):
            self.controller = controller_for(pl_module, self.target, self.options)
        save = type(trainer).save_checkpoint

        def save_exact(*args: Any, **options: Any) -> None:  # No hook is called before Lightning reads the weights.
            with self._running().exact():
                save(trainer, *args, **options)

        vars(trainer)["save_checkpoint"] = save_exact

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.controller is None:
            self.controller = controller_for(pl_module, self.target, self.options)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._total = trainer.global_step, trainer.estimated_stepping_batches
        if not 0 < self._total < float("inf"):
            raise ValueError("the length of training is unknown: pass Trainer(max_steps=...)")
        if self._state:
            self._running().load_state_dict(self._state)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self._steps:  # not where gradients accumulate
            self._steps = trainer.global_step
            controller = self._running()
            controller.step(min(self._steps / self._total, 1.0))
            interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
            if interval and self._steps % interval == 0:
                pl_module.log_dict(controller.measure())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._exact.enter_context(self._running().exact())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exact.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running().finish()
