"""The parts of a study on a GPU, as fractions of what it can do: Mistral-7B shapes, width 131,072, batch 4096.

    .venv/bin/python scripts/bench_gpu.py            one GPU, about five minutes, no network
    .venv/bin/python scripts/bench_gpu.py --small    small shapes on the CPU, to see that it works

Measures first the machine's matrix rates and bandwidth. Then, with random weights and the package's own code: the model
up to the site, an SAE's step with many and with few active features, Adam, the whole training step with its stream, a
checkpoint (12 GiB in TMPDIR), and cross-evaluation. Fractions are of the measured rates, by the counts that
`sae-transfer check` uses: of all that is counted, and of the matrix products alone. Hours are those of 800M tokens; of
the whole training a little too many, as nothing runs beside its first block and its last steps. Writes
results/benchmarks/gpu.json, anew after each part.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Spread, machine, matmul_seconds, say, seconds, table, write_json
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from transformers import AutoModelForCausalLM, MistralConfig

from sae_transfer.analysis.cells import Section, evaluate_model
from sae_transfer.analysis.site import SiteActivations
from sae_transfer.config import SAESpec
from sae_transfer.cost.device import Device
from sae_transfer.cost.shape import ModelShape, model_shape
from sae_transfer.cost.work import (
    Part,
    Precision,
    adam_part,
    head_part,
    layers_part,
    reconstruct_part,
    sae_step_part,
    stream_part,
)
from sae_transfer.models.attention import repeat_keys
from sae_transfer.models.splice import LayerSplicer
from sae_transfer.saes.checkpoints import Checkpoints
from sae_transfer.saes.steps import SPARSE_BELOW
from sae_transfer.saes.store import StoredSAE
from sae_transfer.saes.stream import ActivationStream
from sae_transfer.saes.trainer import FastTrainer

TOKENS = 800e6  # the post's, for Mistral-7B
FEW_ACTIVE = 100  # active features of a token, as of an SAE trained with the post's settings; fewer in a narrow one


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        model: Fields of a Mistral configuration.
        layer: The site is what goes into it.
        context: Tokens a sequence.
        d_sae: Features.
        batch: Activations a training step.
        n_steps: Steps of the whole training, that fill some blocks of the stream.
        square: Side of the matrices that show the machine's rate.
        n_sequences: To be evaluated, as one batch.
    """

    model: dict[str, Any]
    layer: int
    context: int
    d_sae: int
    batch: int
    n_steps: int
    square: int
    n_sequences: int


MISTRAL = {"sliding_window": None, "tie_word_embeddings": False}  # the rest is Mistral-7B's by default
FULL = Sizes(MISTRAL, 16, 2048, 131_072, 4096, 128, 8192, 8)
SMALL_MODEL = {
    **MISTRAL,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SMALL = Sizes(SMALL_MODEL, 2, 64, 512, 256, 4, 256, 4)


@dataclass(frozen=True)
class Result:
    """One part, measured.

    Attributes:
        name: Of what.
        seconds: Of one call.
        n_tokens: That a call deals with.
        part: What it computes in one call.
        peak_bytes: Most GPU memory during a call, with what is there before; None on a CPU.
        of_bound: Fraction of the bound by products and memory traffic, on the measured machine.
        of_products: Fraction of the bound by products alone.
    """

    name: str
    seconds: Spread
    n_tokens: int
    part: tuple[Part, ...]
    peak_bytes: int | None
    of_bound: float
    of_products: float

    @property
    def hours(self) -> float:
        """For 800M tokens."""
        return TOKENS / self.n_tokens * self.seconds.median / 3600


class Bench:
    """The device, its measured rates, and what was found."""

    def __init__(self, sizes: Sizes, device: str, repeats: int, out: Path | None) -> None:
        """Measure the machine; `out` is where results go."""
        self.sizes, self.device, self._repeats, self._out = sizes, device, repeats, out
        self.on_gpu = device != "cpu"
        self.precision: Precision = "bfloat16" if self.on_gpu else "float32"
        self.dtype = getattr(torch, self.precision)
        self.machine = self._measure_machine()
        self.results: list[Result] = []
        self.checkpoint: dict[str, float] = {}
        self.l0: dict[str, float] = {}

    def _measure_machine(self) -> Device:
        n = self.sizes.square

        def rate(dtype: torch.dtype) -> float:
            return 2 * n**3 / matmul_seconds(n, n, n, dtype=dtype, device=self.device) / 1e12

        float32 = rate(torch.float32)
        values = torch.ones(2**28 if self.on_gpu else 2**22, device=self.device)
        copy = torch.empty_like(values)
        torch.add(values, 1.0, out=copy)
        taken = Spread.of([seconds(lambda: torch.add(values, 1.0, out=copy), self.device) for _ in range(7)]).median
        gbps = 2 * 4 * values.numel() / taken / 1e9
        gib = torch.cuda.mem_get_info()[1] / 2**30 if self.on_gpu else 1.0
        return Device("measured", rate(torch.bfloat16) if self.on_gpu else float32, float32, gbps, gib)

    def measure(
        self, name: str, run: Callable[[], object], n_tokens: int, *parts: Part, starts_empty: bool = False
    ) -> None:
        """Time one part, after one call that does not count.

        Args:
            name: Of the part.
            run: What is timed.
            n_tokens: Tokens of a call.
            *parts: Its work.
            starts_empty: Whether torch gives back what it keeps before each call, for a call that makes a CUDA stream:
                no other can use what a stream of a call before kept, which would be given back in the middle of one.
        """
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run()
        taken = Spread.of([self._seconds(run, starts_empty) for _ in range(self._repeats)])
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else None
        bound = sum(part.seconds(self.machine) for part in parts)
        products = sum(part.flops / self.machine.rates[part.precision] for part in parts)
        self.results.append(Result(name, taken, n_tokens, parts, peak, bound / taken.median, products / taken.median))
        say(f"{name}: {taken} s, {bound / taken.median:.0%} of the bound")
        self.write()

    def _seconds(self, run: Callable[[], object], starts_empty: bool) -> float:
        if self.on_gpu and starts_empty:
            torch.cuda.empty_cache()
        return seconds(run, self.device)

    @property
    def few_active(self) -> int:
        """Active features of a token in a step that is to be sparse."""
        return min(FEW_ACTIVE, max(1, int(0.8 * SPARSE_BELOW[torch.device(self.device).type] * self.sizes.d_sae)))

    def write(self) -> None:
        """Write down what has been found."""
        if self._out is None:
            return
        parts = [{**asdict(result), "hours_of_800M_tokens": result.hours} for result in self.results]
        found = {"parts": parts, "l0": self.l0, "checkpoint": self.checkpoint}
        write_json(self._out, {"sizes": asdict(self.sizes), "measured": asdict(self.machine), **found})

    def note_l0(self, name: str, trainer: FastTrainer, batch: torch.Tensor) -> None:
        """Keep the L0 of a part whose steps were to be sparse, or end where they were not."""
        l0 = self.l0[name] = trainer.step(batch).l0.item()
        if l0 > SPARSE_BELOW[batch.device.type] * self.sizes.d_sae:
            raise SystemExit(f"{name}: L0 is {l0:.0f}, and the step was dense")
        say(f"{name}: L0 {l0:.0f} of {self.sizes.d_sae}")
        self.write()


def random_model(sizes: Sizes, n_layers: int, dtype: torch.dtype, device: str) -> Any:
    """A Mistral of so many layers, made where it is used."""
    config = MistralConfig.from_dict({**sizes.model, "num_hidden_layers": n_layers})
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def new_trainer(bench: Bench, d_model: int, n_steps: int) -> FastTrainer:
    """A fresh SAE of the study's width, about half of whose features are active; steps too small to change that."""
    sizes = bench.sizes
    config = StandardTrainingSAEConfig(
        d_in=d_model, d_sae=sizes.d_sae, l1_coefficient=3.0, apply_b_dec_to_input=False, device=bench.device
    )
    torch.manual_seed(0)
    sae = StandardTrainingSAE(config).to(bench.device)
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * sizes.batch,
        train_batch_size_samples=sizes.batch,
        lr=1e-9,
        lr_end=1e-9,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        device=bench.device,
        autocast=bench.on_gpu,
    )
    return FastTrainer(trainer_config, sae)


def random_ids(sizes: Sizes, n_sequences: int, d_vocab: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids `[seq pos]`."""
    return np.random.default_rng(0).integers(d_vocab, size=(n_sequences, sizes.context), dtype=np.int32)


def training(bench: Bench) -> None:
    """The model up to the site, steps, Adam, all of it on a stream, and a checkpoint."""
    sizes = bench.sizes
    model = random_model(sizes, sizes.layer, bench.dtype, bench.device)
    shape = model_shape(model.config.to_dict())
    splicer = LayerSplicer(model, sizes.layer)
    n_sequences = max(1, 16_384 // sizes.context)
    tokens = torch.from_numpy(random_ids(sizes, n_sequences, shape.d_vocab).astype(np.int64)).to(bench.device)
    to_site = layers_part(shape, sizes.layer, sizes.context, bench.precision)
    n_tokens = tokens.numel()
    bench.measure("language model to the site", lambda: splicer.run_to(tokens), n_tokens, to_site.times(n_tokens))

    spec = SAESpec("standard", sizes.d_sae, "l1_coefficient", 3, 0)
    adam = adam_part(spec, shape.d_model)
    dense = sae_step_part(spec, shape.d_model, bench.precision).times(sizes.batch)
    few = sae_step_part(spec, shape.d_model, bench.precision, bench.few_active).times(sizes.batch)
    trainer = new_trainer(bench, shape.d_model, 1000)
    batch = torch.randn(sizes.batch, shape.d_model, device=bench.device)
    bench.measure("SAE step, many active", lambda: trainer.step(batch), sizes.batch, dense, adam)
    make_few_active(bench, trainer, batch)
    bench.measure("SAE step, few active", lambda: trainer.step(batch), sizes.batch, few, adam)
    bench.note_l0("SAE step, few active", trainer, batch)
    for parameter in trainer.sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    bench.measure("Adam and clipping", trainer.optimizer.step, sizes.batch, adam)
    del trainer

    n_rows = -(-sizes.n_steps * sizes.batch // sizes.context) + 1
    ids = random_ids(sizes, n_rows, shape.d_vocab)

    def stream(*, prefetches: bool) -> ActivationStream:
        return ActivationStream(
            splicer,
            ids,
            d_model=shape.d_model,
            norm_scale=1.0,
            batch_size=sizes.batch,
            n_batches=sizes.n_steps,
            seed=0,
            drop_norm_above=None,
            device=bench.device,
            prefetches=prefetches,
        )

    def train(trainer: FastTrainer) -> None:
        for step in stream(prefetches=bench.on_gpu).batches():
            trainer.step(step)

    n_tokens = sizes.n_steps * sizes.batch
    first = stream(prefetches=False).batch(0)
    for name, step in (("many", dense), ("few", few)):
        trainer = new_trainer(bench, shape.d_model, 10 * sizes.n_steps)
        if name == "few":
            make_few_active(bench, trainer, first)
        steps = (step.times(sizes.n_steps), adam.times(sizes.n_steps))
        whole = (to_site.times(n_tokens), stream_part(shape, 1).times(n_tokens), *steps)
        bench.measure(f"whole training, {name} active", partial(train, trainer), n_tokens, *whole, starts_empty=True)
    bench.note_l0("whole training, few active", trainer, first)
    save_checkpoint(bench, trainer)


@torch.no_grad()
def make_few_active(bench: Bench, trainer: FastTrainer, batch: torch.Tensor) -> None:
    """Lower the encoder's bias until few features are active, as they are late in training."""
    pre_acts = batch[:256] @ trainer.sae.W_enc
    kept = bench.few_active * len(pre_acts)
    trainer.sae.get_parameter("b_enc").fill_(-pre_acts.flatten().topk(kept).values[-1])


def save_checkpoint(bench: Bench, trainer: FastTrainer) -> None:
    """Writing one, by the clock: its bytes are bounded by the disk."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        Checkpoints(Path(directory), {"what": "benchmark"}).save(trainer, 0, ())
        taken = time.monotonic() - started
        n_bytes = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    say(f"checkpoint: {taken:.1f} s for {n_bytes / 2**30:.1f} GiB, {n_bytes / taken / 1e9:.2f} GB/s")
    bench.checkpoint = {"seconds": taken, "bytes": n_bytes}
    bench.write()


def evaluation(bench: Bench) -> None:
    """One SAE on the whole model, float32 as a study has it, outliers kept."""
    sizes = bench.sizes
    n_layers = MistralConfig.from_dict(sizes.model).num_hidden_layers
    model = random_model(sizes, n_layers, torch.float32, bench.device)
    shape: ModelShape = model_shape(model.config.to_dict())
    if bench.on_gpu:
        repeat_keys(model)
    splicer = LayerSplicer(model, sizes.layer)
    torch.manual_seed(0)
    config = StandardSAEConfig(d_in=shape.d_model, d_sae=sizes.d_sae, apply_b_dec_to_input=False, device=bench.device)
    sae = StoredSAE("random", "base", StandardSAE(config).eval(), 1.0)
    ids = random_ids(sizes, sizes.n_sequences, shape.d_vocab)
    acts = splicer.run_to(torch.from_numpy(ids.astype(np.int64)).to(bench.device)).float().cpu().numpy()
    section = Section.whole(ids.shape)

    def evaluate() -> None:
        evaluate_model(
            splicer,
            ids,
            SiteActivations(acts, np.linalg.norm(acts, axis=-1).astype(np.float64)),
            section,
            [sae],
            norm_scale=1.0,
            counted={"kept": section.positions},
            scale_policies=["matched"],
            group_size=len(ids),
            batch_size=len(ids),
            device=bench.device,
            progress=lambda done: None,
        )

    above = layers_part(shape, n_layers - sizes.layer, sizes.context, "float32")
    parts = (
        above.times(2),
        head_part(shape, "float32", products=3),  # clean, its second product for the KL, and spliced
        reconstruct_part(shape.d_model, sizes.d_sae),
    )
    bench.measure("cross-evaluation of one SAE", evaluate, ids.size, *(part.times(ids.size) for part in parts))


def main() -> None:
    """Measure all parts, write them down."""
    parser = argparse.ArgumentParser(description="The parts of a study on a GPU, as fractions of what it can do.")
    parser.add_argument("--small", action="store_true", help="Small shapes, on the CPU: does it work?")
    parser.add_argument("--repeats", type=int, default=5, help="Measured calls of each part.")
    parser.add_argument("--width", type=int, default=None, help="Features; unset: 131072.")
    parser.add_argument("--json", type=Path, default=None, help="unset: results/benchmarks/gpu.json, not if --small.")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("bench_gpu.py needs a CUDA GPU; --small runs small shapes on the CPU")
    torch.set_float32_matmul_precision("highest")  # as a study does, whatever the environment says
    sizes = SMALL if arguments.small else FULL
    if arguments.width is not None:
        sizes = Sizes(**{**vars(sizes), "d_sae": arguments.width})
    out = arguments.json or (None if arguments.small else Path("results/benchmarks/gpu.json"))
    bench = Bench(sizes, "cpu" if arguments.small else "cuda", arguments.repeats, out)
    device = bench.machine
    say(
        f"{machine()['gpu'] or machine()['cpu']}: {device.tflops:.3g} TFLOP/s, {device.tflops_float32:.3g} in float32,"
        f" {device.gbps:,.4g} GB/s"
    )
    training(bench)
    evaluation(bench)
    rows = [
        [
            *(result.name, str(result.seconds), f"{result.n_tokens / result.seconds.median:,.0f}"),
            *(f"{result.of_bound:.0%}", f"{result.of_products:.0%}", f"{result.hours:.2f}"),
        ]
        for result in bench.results
    ]
    say(table(["part", "seconds", "tokens/s", "of the bound", "of the products", "hours for 800M tokens"], rows))
    if bench.on_gpu:
        peak = max(result.peak_bytes or 0 for result in bench.results) / 2**30
        say(f"most memory: {peak:.1f} GiB")


if __name__ == "__main__":
    main()
