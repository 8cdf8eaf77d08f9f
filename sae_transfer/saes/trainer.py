"""SAELens's trainer with faster steps: its counters, schedules, statistics and saved state, the same numbers."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_transfer.saes.optimizer import ClippingAdam
from sae_transfer.saes.steps import Outcome, by_hand, standard_step, topk_step


class StepOutput(NamedTuple):
    """What a training curve needs of a step; holds nothing `[batch d_sae]`.

    Attributes:
        sae_in: The batch.
        sae_out: Its reconstruction.
        loss: All losses together, mean over the batch.
        losses: The same one by one, by SAELens's names.
        l0: Active features, mean over the batch.
    """

    sae_in: Float[Tensor, "batch d_model"]
    sae_out: Float[Tensor, "batch d_model"]
    loss: Float[Tensor, ""]
    losses: dict[str, Float[Tensor, ""]]
    l0: Float[Tensor, ""]


class FastTrainer(SAETrainer[Any, Any]):
    """`SAETrainer` whose `step` costs less. `save_trainer_state` and `load_trainer_state` are SAELens's, and enough."""

    def __init__(self, config: SAETrainerConfig, sae: TrainingSAE[Any]) -> None:
        """Train this SAE, in place, on batches given to `step`."""
        super().__init__(config, sae, iter(()))
        # made in the process's default type, which another thread changes while it loads a bfloat16 model
        self.act_freq_scores = self.act_freq_scores.float()
        self.n_forward_passes_since_fired = self.n_forward_passes_since_fired.float()
        assert config.lr_end is not None
        self._device = torch.device(config.device)
        self._dtype = torch.bfloat16 if config.autocast else torch.float32
        self._by_hand = by_hand(sae, self._device)
        self.optimizer = ClippingAdam(sae.parameters(), lr=config.lr, betas=(config.adam_beta1, config.adam_beta2))
        self.lr_scheduler = get_lr_scheduler(  # SAELens's is bound to the optimizer that was replaced
            config.lr_scheduler_name,
            lr=config.lr,
            optimizer=self.optimizer,
            warm_up_steps=config.lr_warm_up_steps,
            decay_steps=config.lr_decay_steps,
            training_steps=config.total_training_steps,
            lr_end=config.lr_end,
            num_cycles=config.n_restart_cycles,
        )

    def step(self, batch: Float[Tensor, "batch d_model"]) -> StepOutput:  # type: ignore[override]
        """One training step; as SAELens's, it leaves `n_training_steps` to the caller.

        Args:
            batch: Scaled activations.

        Returns:
            What is known of the batch, before the update.
        """
        x = batch.to(self._device, self.sae.dtype)
        with _tensor_cores.on(self._device):
            outcome = self._gradients(x)
        self._count(outcome.counts, len(x))
        self.optimizer.step()
        if self._device.type != "cpu" or not self._by_hand:
            # a CPU gets the memory of new gradients page by page, which takes as long as a sparse product
            self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        loss = torch.stack(list(outcome.losses.values())).sum()
        return StepOutput(x, outcome.sae_out, loss, outcome.losses, outcome.counts.sum() / len(x))

    def _gradients(self, x: Float[Tensor, "batch d_model"]) -> Outcome:
        if not self._by_hand:
            return self._plain(x)
        if isinstance(self.sae, StandardTrainingSAE):
            return standard_step(self.sae, x, self.get_coefficients()["l1"], self._dtype)
        return topk_step(self.sae, x, self.dead_neurons, self._dtype)

    def _plain(self, x: Float[Tensor, "batch d_model"]) -> Outcome:
        """SAELens's forward pass and autograd."""
        self.sae.train()
        with self.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=False,
                )
            )
        output.loss.backward()
        counts = output.feature_acts.detach().sign().sum(0, dtype=torch.float32)  # activations are never negative
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        return Outcome(output.sae_out.detach(), losses, counts)

    @torch.no_grad()
    def _count(self, counts: Float[Tensor, "d_sae"], n_rows: int) -> None:
        """The statistics that SAELens keeps of a step."""
        self.n_training_samples += n_rows
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += self.cfg.train_batch_size_samples


class _TensorCores:
    """Float32 products of a GPU in TF32 while a step runs, in one thread or several: evaluation is exact."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_steps, self._before = 0, "highest"

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            yield
            return
        with self._lock:
            if self._n_steps == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
            self._n_steps += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_steps -= 1
                if self._n_steps == 0:
                    torch.set_float32_matmul_precision(self._before)


_tensor_cores = _TensorCores()
