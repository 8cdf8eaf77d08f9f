"""Training against SAELens's own runners and trainer: CPU time, memory, and whether the SAEs are as good.

    python scripts/bench_train.py --part run --json results/benchmarks/train.json
    python scripts/bench_train.py --part step --json results/benchmarks/train_step.json
    python scripts/bench_train.py --part fresh --json results/benchmarks/train_fresh.json

Part `run`: several widths on one model, from token ids to folded SAEs on disk. SAELens runs with its defaults (a run a
width, HookedTransformer) and with the best settings we know: all widths in its multi-SAE runner, the Hugging Face model
with nothing above the site, smaller batches of it, and a mixing buffer of 500 sequences (with the default 20 its SAEs
end with a loss 0.6 percent above ours, for want of shuffling). Everyone gets the same ids, initial weights, schedules
and number of tokens for the norm. The initial weights change from round to round, and each round's SAEs are compared by
their loss on held-out tokens. In SAELens's favour: its default of 1000 batches for the norm is cut to what we take, and
wandb is off.

Part `step`: steps of one wide standard SAE on activations made from a sparse dictionary. The checkpoint started from is
that dictionary itself, with the encoder bias that gives the L0 asked for. Part `fresh`: a short training of such an SAE
from fresh weights. Our dense step is a side too. SAELens's one setting for a float32 step is `compile_sae`, taken where
there is a C++ compiler; compiling itself is not measured.
"""

import argparse
import contextlib
import copy
import io
import logging
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench import Spread, alternating, extra_peak_bytes, machine, ratio, say, seconds, table, write_json
from datasets import Dataset
from numpy.typing import NDArray
from sae_lens import SAE, TrainingSAE
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.load_model import HookedProxyLM
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import nn

from sae_transfer.models.pair import load_model, load_tokenizer, resolve
from sae_transfer.models.splice import open_splicer
from sae_transfer.models.tokens import build_token_set
from sae_transfer.saes.steps import SPARSE_BELOW
from sae_transfer.saes.stream import ActivationStream, measure_norm_scale
from sae_transfer.saes.trainer import FastTrainer
from sae_transfer.saes.training import Schedule, Trainee, new_sae, train_saes

OURS, OURS_DENSE = "sae_transfer", "sae_transfer, dense"
DEFAULTS = "SAELens, defaults"
TUNED = "SAELens, multi-SAE runner, tuned"
COMPILED = "SAELens, compile_sae"
SAME, SAME_L0 = 1e-3, 1e-2  # relative: rounding grows over a hundred steps, by which features come and go
L1_WARMUP, LR_DECAY = 0.05, 0.2  # fractions of all steps, the post's


@dataclass(frozen=True)
class Setting:
    """What all sides of part `run` share."""

    args: argparse.Namespace
    model: Any
    splicer: Any
    hook_name: str
    training: NDArray[np.integer]
    held_out: torch.Tensor
    norm_scale: float
    directory: Path

    @property
    def n_steps(self) -> int:
        """Of a whole training."""
        return self.args.tokens // self.args.batch_size

    def sae(self, width: int, seed: int, normalize: str = "none") -> TrainingSAE[Any]:
        """A fresh SAE of the architecture asked for."""
        key, value = ("l1_coefficient", self.args.l1) if self.args.architecture == "standard" else ("k", self.args.k)
        sae = new_sae(
            self.args.architecture,
            d_in=self.held_out.shape[1],
            d_sae=width,
            sparsity_key=key,
            sparsity_value=value,
            seed=seed,
            sparsity_warmup_steps=round(L1_WARMUP * self.n_steps),
            options={"apply_b_dec_to_input": False},
            metadata={},
            device="cpu",
        )
        sae.cfg.normalize_activations = normalize  # pyright: ignore[reportAttributeAccessIssue]
        return sae


class Ours:
    """`train_saes` on one stream."""

    def __init__(self, setting: Setting) -> None:
        """Nothing is kept between rounds but the number of the next."""
        self._setting, self._seed, self._calls = setting, 0, 0

    def __call__(self, n_steps: int | None = None) -> None:
        """One round: the norm, the training, the files."""
        n_steps = n_steps or self._setting.n_steps
        s, args = self._setting, self._setting.args
        d_model = s.held_out.shape[1]
        rows = -(-args.norm_batches * args.batch_size // s.training.shape[1])
        norm_scale = measure_norm_scale(s.splicer, s.training[:rows], d_model, "cpu")
        stream = ActivationStream(
            s.splicer,
            s.training,
            d_model=d_model,
            norm_scale=norm_scale,
            batch_size=args.batch_size,
            n_batches=n_steps,
            seed=self._seed,
            drop_norm_above=None,
            device="cpu",
        )
        self._calls += 1  # what a directory holds already is not trained again
        where = {width: s.directory / f"ours-{self._calls}-{width}" for width in args.widths}
        about = {"trained_on": "base", "role": "trained", "sparsity_key": "", "sparsity_value": 0, "seed": self._seed}
        trainees = [Trainee(where[width], s.sae(width, self._seed), about, identity={}) for width in args.widths]
        schedule = Schedule(args.lr, 0.0, LR_DECAY)
        train_saes(
            trainees,
            stream,
            schedule,
            norm_scale=norm_scale,
            autocast=False,
            device="cpu",
            label="ours",
            checkpoint_every_min=60,  # SAELens, too, writes none by default
        )
        self._seed += n_steps == self._setting.n_steps
        self.trained = {width: SAE.load_from_disk(directory) for width, directory in where.items()}


class Theirs:
    """SAELens's runners."""

    def __init__(self, setting: Setting, *, tuned: bool) -> None:
        """Make the model that they take; it is loaded once, as ours is."""
        self._setting, self._tuned, self._seed = setting, tuned, 0
        if tuned:
            self._model: Any = lower_layers(setting.model, setting.args.layer)
            self._hook = f"model.layers.{setting.args.layer - 1}"
            self._model = HookedProxyLM(self._model, None, hook_names=[self._hook])  # pyright: ignore
        else:
            with quiet():
                self._model = hooked_transformer(setting.model, setting.training.shape[1])
            self._hook = setting.hook_name
        self._data = Dataset.from_dict({"input_ids": setting.training.astype(np.int64)})

    def __call__(self, n_steps: int | None = None) -> None:
        """One round."""
        n_steps = n_steps or self._setting.n_steps
        args, widths = self._setting.args, self._setting.args.widths
        saes = {str(w): self._setting.sae(w, self._seed, "expected_average_only_in") for w in widths}
        torch.manual_seed(self._seed)
        shared = {
            "context_size": self._setting.training.shape[1],
            "training_tokens": n_steps * args.batch_size,
            "train_batch_size_tokens": args.batch_size,
            "n_batches_for_norm_estimate": args.norm_batches,
            "lr": args.lr,
            "lr_end": args.lr,
            "lr_decay_steps": round(LR_DECAY * n_steps),
            "logger": LoggingConfig(log_to_wandb=False),
            "checkpoint_path": None,
            "model_name": "given",
        }
        given = {"override_dataset": self._data, "override_model": self._model}
        with quiet():
            if self._tuned:
                config = MultiSAETrainingRunnerConfig(
                    saes={name: sae.cfg for name, sae in saes.items()},
                    hook_names=self._hook,
                    store_batch_size_prompts=args.prompts,
                    n_batches_in_buffer=args.buffer,
                    output_path=str(self._setting.directory / "tuned"),
                    **shared,
                )
                MultiSAETrainingRunner(config, override_saes=saes, **given).run()
            else:
                for name, sae in saes.items():
                    config = LanguageModelSAERunnerConfig(
                        sae=sae.cfg,
                        hook_name=self._hook,
                        output_path=str(self._setting.directory / f"defaults-{name}"),
                        **shared,
                    )
                    LanguageModelSAETrainingRunner(config, override_sae=sae, **given).run()
        self._seed += n_steps == self._setting.n_steps
        self.trained = {int(name): sae for name, sae in saes.items()}


@contextlib.contextmanager
def quiet() -> Any:
    """Without SAELens's progress bars and warnings, which cost it nothing that we count."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lower_layers(model: Any, n_layers: int) -> Any:
    """A Hugging Face model with only the first layers, the weights shared."""
    lower, decoder = copy.copy(model), copy.copy(model.model)
    lower._modules, decoder._modules = dict(model._modules), dict(model.model._modules)
    decoder.layers = nn.ModuleList(model.model.layers[:n_layers])
    lower.model = decoder
    return lower


def hooked_transformer(model: Any, context: int) -> Any:
    """SAELens's default model, of the same weights, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    c = model.config
    if c.model_type != "llama":
        sys.exit(f"a {c.model_type} model: this benchmark converts llama alone")
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=context,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=None if c.num_key_value_heads == c.num_attention_heads else c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
    )
    hooked = HookedTransformer(config)
    with torch.no_grad():
        hooked.load_state_dict(convert_llama_weights(model, config), strict=False)
    return hooked.eval().requires_grad_(False)


@torch.no_grad()
def held_out_loss(sae: SAE[Any], x: torch.Tensor, norm_scale: float, l1: float) -> dict[str, float]:
    """Loss in scaled space and L0 of a folded SAE; x raw."""
    acts = sae.encode(x)
    error = ((sae.decode(acts) - x) * norm_scale).square().sum(-1).mean().item()
    penalty = l1 * (acts * sae.W_dec.norm(dim=1) * norm_scale).sum(-1).mean().item()
    return {"loss": error + penalty, "mse": error, "l0": (acts > 0).sum(-1).float().mean().item()}


def part_run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Total time of several widths, from ids to files."""
    checkpoint = resolve(args.model)
    model = load_model(checkpoint, dtype="float32", device="cpu")
    hook_name = f"blocks.{args.layer}.hook_resid_pre"
    splicer = open_splicer(model, hook_name, checkpoint)
    tokens = build_token_set(
        directory / "tokens",
        load_tokenizer(checkpoint),
        dataset=args.dataset,
        subset=None,
        split="train",
        column="text",
        revision=None,
        context_size=args.context,
        prepend_bos=True,
        bos_token=None,
        separator="bos",
        seed=args.seed,
        n_evaluation_tokens=16_384,
        # SAELens takes the tokens for its norm off the training stream, and fills a buffer ahead of it
        n_training_tokens=args.tokens + args.norm_batches * args.batch_size + args.buffer * args.context,
    )
    held_out = splicer.run_to(torch.from_numpy(tokens.evaluation.astype(np.int64))).flatten(0, 1)
    norm_scale = held_out.shape[1] ** 0.5 / held_out.norm(dim=-1).mean().item()
    s = Setting(args, model, splicer, hook_name, tokens.training, held_out.clone(), norm_scale, directory)
    sides: dict[str, Any] = {OURS: Ours(s), DEFAULTS: Theirs(s, tuned=False), TUNED: Theirs(s, tuned=True)}
    quality: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in sides}
    runs: dict[str, list[float]] = {name: [] for name in sides}
    l1 = args.l1 if args.architecture == "standard" else 0.0
    for side in sides.values():
        side(10)  # what is made once is not measured
    for number in range(args.repeats):
        for name, side in sides.items():
            runs[name].append(seconds(side))
            losses = {str(w): held_out_loss(sae, s.held_out, norm_scale, l1) for w, sae in side.trained.items()}
            quality[name].append(losses)
            say(f"  round {number + 1}, {name}: {runs[name][-1]:.1f} s")
    times = {name: Spread.of(values) for name, values in runs.items()}
    memory = {name: extra_peak_bytes(side) for name, side in sides.items()}
    return show_run(args, times, quality, memory)


def loss_over_seeds(rounds: list[dict[str, dict[str, float]]], width: str) -> tuple[float, float]:
    """Mean over the seeds, and standard deviation; infinite for one seed."""
    losses = [each[width]["loss"] for each in rounds]
    return statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else float("inf")


def show_run(
    args: argparse.Namespace,
    times: Mapping[str, Spread],
    quality: Mapping[str, list[dict[str, dict[str, float]]]],
    memory: Mapping[str, int],
) -> dict[str, Any]:
    """Print part `run`; the same as data."""
    ratios = {name: ratio(spread, times[OURS]) for name, spread in times.items()}
    say(f"\n{len(args.widths)} SAEs ({args.architecture}, widths {args.widths}), {args.tokens} tokens each")
    rows = [(n, times[n], ratios[n], f"{memory[n] / 2**20:.0f}") for n in times]
    say(table(("side", "CPU s", "times ours", "extra peak MiB"), rows))
    rows = []
    for width in map(str, args.widths):
        for name, rounds in quality.items():
            loss, noise = loss_over_seeds(rounds, width)
            mse, l0 = (statistics.mean(each[width][key] for each in rounds) for key in ("mse", "l0"))
            rows.append((width, name, f"{loss:.4f}", f"{noise:.4f}", f"{mse:.4f}", f"{l0:.1f}"))
    say(f"\nheld-out loss, mean over {args.repeats} seeds")
    say(table(("width", "side", "loss", "its sd over seeds", "mse", "L0"), rows))
    for width in map(str, args.widths):
        (ours, sd), (theirs, other_sd) = (loss_over_seeds(quality[name], width) for name in (OURS, TUNED))
        if ours - theirs > 2 * max(sd, other_sd):
            sys.exit(f"width {width}: our held-out loss {ours:.4f} is above {theirs:.4f}, by more than seeds' noise")
    return {"seconds": times, "ratio": ratios, "extra_bytes": memory, "held_out": quality}


def dictionary_batches(args: argparse.Namespace, n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Unit directions `[d_sae d_model]`, and batches of sparse sums of them, of norm about sqrt(d_model)."""
    generator = torch.Generator().manual_seed(args.seed)
    directions = torch.randn(args.d_sae, args.d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    batches = []
    for _ in range(n):
        chosen = torch.randint(args.d_sae, (args.step_batch, args.dictionary_l0), generator=generator)
        sizes = 0.5 + torch.rand(chosen.shape, generator=generator)
        batch = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=sizes, mode="sum")
        batches.append(batch * (args.d_model**0.5 / batch.norm(dim=1).mean()))
    return directions, batches


def checkpoint_at(l0: float, directions: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """Encoder bias that gives this L0 when the encoder is the dictionary; and the L0."""
    products = (x @ directions.T).flatten()
    threshold = products.kthvalue(products.numel() - round(l0 * len(x))).values.item()
    return -threshold, (products > threshold).sum().item() / len(x)


def refuse_other(what: str, theirs: float, ours: float, side: str, allowed: float) -> None:
    """End the benchmark where a side did other work."""
    if not abs(theirs - ours) <= allowed * abs(ours):
        sys.exit(f"{what}: {theirs:.6g} of {side}, {ours:.6g} of {OURS}; allowed is a difference of {allowed:.0e}")


class StepSides:
    """Trainers of one wide SAE, a side each, on the same batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Make the dictionary, its batches, and the encoder bias that gives the L0 asked for."""
        self._args = args
        self._directions, self.batches = dictionary_batches(args, 16)
        self._bias, _ = checkpoint_at(args.l0, self._directions, self.batches[0])
        self.names = [OURS, OURS_DENSE, DEFAULTS]
        compiler = os.environ.get("CXX", "g++")
        if args.compile and shutil.which(compiler):
            self.names.append(COMPILED)
        elif args.compile:
            say(f"without {COMPILED}: there is no {compiler}")

    def new(self, *, at_checkpoint: bool) -> TrainingSAE[Any]:
        """An SAE that is the dictionary, or a fresh one."""
        args = self._args
        sae = new_sae(
            "standard",
            d_in=args.d_model,
            d_sae=args.d_sae,
            sparsity_key="l1_coefficient",
            sparsity_value=args.step_l1,
            seed=args.seed,
            sparsity_warmup_steps=0 if at_checkpoint else round(L1_WARMUP * args.steps),
            options={"apply_b_dec_to_input": False},
            metadata={},
            device="cpu",
        )
        if at_checkpoint:
            with torch.no_grad():
                sae.W_dec.copy_(self._directions)
                sae.W_enc.copy_(self._directions.T)
                sae.get_parameter("b_enc").fill_(self._bias)
        return sae

    def trainer(self, side: str, sae: TrainingSAE[Any], lr: float) -> SAETrainer[Any, Any]:
        """A side's trainer of an SAE."""
        config = SAETrainerConfig(
            total_training_samples=10_000 * self._args.step_batch,
            train_batch_size_samples=self._args.step_batch,
            lr=lr,
            lr_end=lr,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            device="cpu",
            autocast=False,
        )
        if side == COMPILED and "training_forward_pass" not in vars(sae):  # as SAELens's runner does it
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        return FastTrainer(config, sae) if side in (OURS, OURS_DENSE) else SAETrainer(config, sae, iter(()))

    def steps(self, side: str, trainer: SAETrainer[Any, Any], n: int) -> Callable[[], None]:
        """So many steps."""

        def run() -> None:
            with mock.patch.dict(SPARSE_BELOW, {"cpu": -1.0} if side == OURS_DENSE else {}):
                for i in range(n):
                    trainer.step(self.batches[i % len(self.batches)])
                    trainer.n_training_steps += 1

        return run


def part_step(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a step from a checkpoint of low L0."""
    sides = StepSides(args)
    memory, l0, warm = {}, {}, {}
    for name in sides.names:
        # the least learning rate: the state, and so L0, is that of the checkpoint in every round
        warm[name] = sides.trainer(name, sides.new(at_checkpoint=True), 1e-9)
        sides.steps(name, warm[name], 2)()
        for parameter in warm[name].sae.parameters():
            parameter.grad = None  # ours keeps them from step to step; they are a step's memory on every side
        memory[name] = extra_peak_bytes(sides.steps(name, warm[name], 2))
        l0[name] = warm[name].act_freq_scores.sum().item() / warm[name].n_frac_active_samples
        refuse_other("L0", l0[name], l0[OURS], name, SAME)
    times = alternating({name: sides.steps(name, of, args.steps_a_round) for name, of in warm.items()}, args.repeats)
    per_step = {n: Spread.of([t / args.steps_a_round for t in spread.runs]) for n, spread in times.items()}
    say(f"\nwidth {args.d_sae}, d_model {args.d_model}, batch {args.step_batch}: one step from L0 {l0[OURS]:.1f}")
    ratios = {name: ratio(spread, per_step[OURS]) for name, spread in per_step.items()}
    rows = [(n, per_step[n], ratios[n], f"{memory[n] / 2**20:.0f}") for n in sides.names]
    say(table(("side", "CPU s a step", "times ours", "extra peak MiB"), rows))
    return {"seconds_a_step": per_step, "ratio": ratios, "extra_bytes": memory, "l0": l0}


def part_fresh(args: argparse.Namespace) -> dict[str, Any]:
    """Time of a training from fresh weights."""
    sides = StepSides(args)
    # the same SAE in every round, put back to its start, since compiled code belongs to one
    fresh = {name: sides.new(at_checkpoint=False) for name in sides.names}
    start = copy.deepcopy(fresh[OURS].state_dict())
    runs: dict[str, list[float]] = {name: [] for name in sides.names}
    losses: dict[str, list[float]] = {name: [] for name in sides.names}
    l0 = {}
    for round_ in range(args.repeats + 1):
        for name in sides.names:
            fresh[name].load_state_dict(start)
            training = sides.trainer(name, fresh[name], args.step_lr)
            if round_ == 0:  # makes what is made once
                sides.steps(name, training, 3)()
                continue
            runs[name].append(seconds(sides.steps(name, training, args.steps)))
            losses[name] += [training.step(b).loss.item() for b in sides.batches[:4]]
            l0[name] = (fresh[name].encode(sides.batches[0]) > 0).sum(-1).float().mean().item()
    times = {name: Spread.of(values) for name, values in runs.items()}
    ratios = {name: ratio(spread, times[OURS]) for name, spread in times.items()}
    say(f"\nwidth {args.d_sae}, d_model {args.d_model}, batch {args.step_batch}: {args.steps} steps from fresh weights")
    ends = {name: statistics.mean(values) for name, values in losses.items()}
    rows = [(n, times[n], ratios[n], f"{l0[n]:.1f}", f"{ends[n]:.4f}") for n in sides.names]
    say(table(("side", "CPU s", "times ours", "L0 at the end", "loss at the end"), rows))
    for name in sides.names:
        refuse_other("loss at the end", ends[name], ends[OURS], name, SAME)
        refuse_other("L0 at the end", l0[name], l0[OURS], name, SAME_L0)
    return {"seconds": times, "ratio": ratios, "l0": l0, "loss": losses}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["run", "step", "fresh", "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds; in part run, seeds")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the tokens and of the dictionary")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="where the results are written")
    run = parser.add_argument_group("part run")
    run.add_argument("--model", default="demo:base", help="demo:base, or a directory with a llama model")
    run.add_argument("--dataset", default="demo:text", help="text, or a .npy of token ids")
    run.add_argument("--layer", type=int, default=2, help="whose input is the site")
    run.add_argument("--context", type=int, default=128)
    run.add_argument("--architecture", choices=["standard", "topk", "batchtopk"], default="standard")
    run.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    run.add_argument("--tokens", type=int, default=409_600, help="activations that each SAE is trained on")
    run.add_argument("--batch-size", type=int, default=1024)
    run.add_argument("--norm-batches", type=int, default=64, help="for the norm scaling factor, on every side")
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--l1", type=float, default=2.0)
    run.add_argument("--k", type=int, default=32)
    run.add_argument("--prompts", type=int, default=8, help="sequences a pass of the language model, SAELens tuned")
    run.add_argument(
        "--buffer", type=int, default=500, help="sequences in the mixing buffer, SAELens tuned; its own default is 20"
    )
    step = parser.add_argument_group("parts step and fresh")
    step.add_argument("--d-sae", type=int, default=8192)
    step.add_argument("--d-model", type=int, default=512)
    step.add_argument("--step-batch", type=int, default=1024)
    step.add_argument("--l0", type=float, default=30, help="of the checkpoint")
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="a side with compile_sae")
    step.add_argument("--dictionary-l0", type=int, default=16, help="directions in an activation")
    step.add_argument("--steps-a-round", type=int, default=4)
    step.add_argument("--steps", type=int, default=100, help="from fresh weights")
    step.add_argument("--step-lr", type=float, default=1e-3)
    step.add_argument("--step-l1", type=float, default=5.0)
    return parser.parse_args()


def main() -> None:
    """Run it."""
    args = arguments()
    torch.set_num_threads(args.threads)
    for name in ("sae_transfer", "sae_lens", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, Any] = {"options": {key: value for key, value in vars(args).items() if key != "json"}}
    say(str(machine()))
    if args.part in ("run", "all"):
        with tempfile.TemporaryDirectory() as scratch:
            results["run"] = part_run(args, Path(scratch))
    if args.part in ("step", "all"):
        results["step"] = part_step(args)
    if args.part in ("fresh", "all"):
        results["fresh"] = part_fresh(args)
    if args.json:
        write_json(args.json, results)
        say(f"written to {args.json}")


if __name__ == "__main__":
    main()
