"""Tokens to activations at the site, against SAELens's `ActivationsStore`: CPU time, memory, equality.

    python scripts/bench_lm.py --json results/benchmarks/lm.json
    python scripts/bench_lm.py --contexts 1024 --layers 16 --site 8 --d-model 768

A model of Mistral's or Qwen2's form with random weights is made; all sides then turn the same token rows into the same
activations, batch by batch. Ours is what the training stream runs: the layers below the site alone, loaded without the
others. SAELens runs as it does by default (HookedTransformer, 32 prompts a batch, fewer where there are fewer) and with
the best settings we know: its wrapper of the Hugging Face model, which has the fused attention, at several batch sizes;
its store reads rows that are tokenized already, and neither side's shuffling is measured. What is loaded once is loaded
before. A difference of the activations ends the benchmark with an error.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import alternating, extra_peak_bytes, machine, ratio, say, table, write_json
from bench_eval import Sizes, hooked_transformer, make_model, parsed
from datasets import Dataset
from numpy.typing import NDArray
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore

from sae_transfer.models.pair import layers_to, load_model, resolve
from sae_transfer.models.splice import Splicer, open_splicer
from sae_transfer.saes.stream import rows_per_pass, run_sequences

DEFAULT_PROMPTS = 32  # `store_batch_size_prompts` of sae_lens 6.54
RELATIVE = 1e-4
OURS = "sae_transfer"


def ours(splicer: Splicer, tokens: NDArray[np.integer], device: str) -> Iterator[torch.Tensor]:
    """Activations `[batch pos d_model]` of all rows, in the passes of the training stream."""
    rows = rows_per_pass(tokens.shape[1], device)
    for row in range(0, len(tokens), rows):
        yield run_sequences(splicer, tokens[row : row + rows], device)


def theirs(
    model: Any, hook_name: str, rows: Dataset, sizes: Sizes, prompts: int, device: str
) -> Iterator[torch.Tensor]:
    """The same by SAELens's store, as its trainer's buffer asks for them: `[tok d_model]`."""
    store = ActivationsStore(
        model=model,
        dataset=rows,
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=sizes.context,
        d_in=sizes.d_model,
        n_batches_in_buffer=20,
        total_training_tokens=sizes.sequences * sizes.context,
        store_batch_size_prompts=prompts,
        train_batch_size_tokens=4096,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device(device),
        dtype="float32",
    )
    for _ in range(sizes.sequences // prompts):
        yield store.get_raw_llm_batch()[0]


def whole_batches(n_rows: int, prompts: Sequence[int]) -> int:
    """The next smaller number of rows that batches of each size divide, or that are one: SAELens's store fills them."""
    return next(n for n in range(n_rows, 0, -1) if all(n % min(size, n) == 0 for size in prompts))


def largest_difference(one: Iterator[torch.Tensor], other: Iterator[torch.Tensor], d_model: int) -> float:
    """Of two runs over the same rows, relative to the largest activation."""
    a, b = (torch.cat([acts.reshape(-1, d_model) for acts in acts_of]) for acts_of in (one, other))
    return ((a - b).abs().max() / b.abs().max()).item()


def measure(args: argparse.Namespace, context: int, directory: Path) -> dict[str, Any]:
    """Compare the activations at one length of context, then time and memory of every side."""
    sizes = Sizes(
        args.d_model, args.layers, args.site, args.heads, args.kv_heads, args.d_mlp, args.d_vocab, context,
        whole_batches(max(1, args.tokens // context), [*args.prompts, DEFAULT_PROMPTS]), saes=0, d_sae=0,
    )  # fmt: skip
    model = make_model(directory, args.form, sizes, args.seed).to(args.device)
    hook_name, proxy_hook = f"blocks.{sizes.site}.hook_resid_pre", f"model.layers.{sizes.site - 1}"
    checkpoint = resolve(str(directory))
    layers = layers_to(hook_name, checkpoint.n_layers)
    low = load_model(checkpoint, dtype="float32", device=args.device, layers=layers)
    splicer = open_splicer(low, hook_name, checkpoint)
    tokens = np.random.default_rng(args.seed).integers(2, sizes.d_vocab, (sizes.sequences, context), np.uint16)
    tokens[:, 0] = 0  # SAELens checks that a row begins with BOS
    rows = Dataset.from_dict({"tokens": tokens.astype(np.int64)})

    proxy = HookedProxyLM(model, None, hook_names=[proxy_hook])  # pyright: ignore[reportArgumentType]
    hooked = hooked_transformer(model, directory, context)
    runs: dict[str, Callable[[], Iterator[torch.Tensor]]] = {OURS: lambda: ours(splicer, tokens, args.device)}
    default = min(DEFAULT_PROMPTS, sizes.sequences)
    named = {f"SAELens, defaults (HookedTransformer, {default} prompts)": (hooked, hook_name, default)}
    for prompts in sorted({min(n, sizes.sequences) for n in args.prompts}):
        named[f"SAELens, tuned (HookedTransformer, {prompts} prompts)"] = (hooked, hook_name, prompts)
        named[f"SAELens, tuned (Hugging Face with SDPA, {prompts} prompts)"] = (proxy, proxy_hook, prompts)
    for name, (used, hook, prompts) in named.items():
        runs[name] = lambda used=used, hook=hook, prompts=prompts: theirs(used, hook, rows, sizes, prompts, args.device)

    differences = {name: largest_difference(runs[OURS](), run(), sizes.d_model) for name, run in runs.items()}
    for name, difference in differences.items():
        if not difference <= RELATIVE:
            sys.exit(f"activations differ from {name} by {difference:.1e} (relative), allowed {RELATIVE:.0e}")
    sides = {name: lambda run=run: sum(len(acts) for acts in run()) for name, run in runs.items()}
    memory = {name: extra_peak_bytes(side, args.device) for name, side in sides.items()}
    times = alternating(sides, args.repeats, device=args.device, warm_ups=0)
    ratios = {name: ratio(spread, times[OURS]) for name, spread in times.items()}
    n_tokens = sizes.sequences * context
    header = ("side", "time s", "tokens/s", "times ours", "extra MiB", "difference")
    say(f"{n_tokens} tokens in rows of {context}")
    say(
        table(
            header,
            [
                (
                    name,
                    times[name],
                    f"{n_tokens / times[name].median:,.0f}",
                    ratios[name],
                    f"{memory[name] / 2**20:.0f}",
                    f"{differences[name]:.0e}",
                )
                for name in runs
            ],
        )
    )
    return {
        "tokens": n_tokens,
        "seconds": times,
        "ratio": ratios,
        "extra_bytes": memory,
        "differences": differences,
        "weights_bytes": {
            "up to the site": sum(p.nbytes for p in low.parameters()),
            "whole": sum(p.nbytes for p in model.parameters()),
        },
        "difference_from_transformer_lens_at_load": splicer.difference,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=["mistral", "qwen2"], default="mistral", help="architecture of the model")
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--site", type=int, default=4, help="layer whose input is the site, at least 1")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--d-mlp", type=int, default=1024)
    parser.add_argument("--d-vocab", type=int, default=32000)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048], help="tokens of a sequence")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="in all, at each context; whole batches of them are taken"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1], help="batch sizes to try for SAELens")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="where the results are written")
    return parsed(parser)


def main() -> None:
    """Run it."""
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.getLogger("sae_transfer").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="sae_lens")  # that the rows are few, and how it makes tensors of them
    say(str(machine()))
    contexts = {}
    for context in args.contexts:
        with tempfile.TemporaryDirectory() as scratch:
            contexts[context] = measure(args, context, Path(scratch) / "model")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, {"options": options, "contexts": contexts})
        say(f"written to {args.json}")


if __name__ == "__main__":
    main()
