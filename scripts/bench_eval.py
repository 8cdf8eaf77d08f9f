"""Cross-evaluation against SAELens's own `run_evals`: CPU time, memory, and whether the numbers are the same.

    python scripts/bench_eval.py --sequences 1 --prompts 1 --json results/benchmarks/eval.json
    python scripts/bench_eval.py --d-model 256 --d-vocab 151936 --saes 8 --sequences 1 --prompts 1 --layers 4 \
        --site 2 --json results/benchmarks/eval_vocabulary.json

A model of Mistral's or Qwen2's form with random weights and random SAEs are made; both sides then give cross-entropy
(clean, spliced, zero-ablated), KL, L0, explained variance and MSE of every SAE over the same tokens. SAELens runs
with its defaults (HookedTransformer, 16 prompts a batch, or all where there are fewer) and with the best settings we
know: its wrapper of the Hugging Face model, which has the fused attention, at several batch sizes. What is loaded
once is loaded before. A difference of the numbers ends the benchmark with an error.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Spread, alternating, extra_peak_bytes, machine, matmul_seconds, ratio, say, table, write_json
from numpy.typing import NDArray
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import AutoConfig, AutoModelForCausalLM

from sae_transfer.analysis.cells import CellKey, CellSums, Section, evaluate_model
from sae_transfer.analysis.metrics import metric_values
from sae_transfer.analysis.site import collect_activations
from sae_transfer.models.attention import repeat_keys
from sae_transfer.models.pair import resolve
from sae_transfer.models.splice import Splicer, open_splicer
from sae_transfer.saes.store import StoredSAE

DEFAULT_PROMPTS = 16  # `--batch_size_prompts` of sae_lens 6.54
RELATIVE = {"ce": 1e-5, "kl": 1e-5, "ratio": 1e-4}
LAST_ID = 1  # ends every sequence and stands nowhere else: SAELens leaves positions out by their token


@dataclass(frozen=True)
class Sizes:
    """Of the model, the SAEs and the tokens."""

    d_model: int
    n_layers: int
    site: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    context: int
    sequences: int
    saes: int
    d_sae: int

    @property
    def d_head(self) -> int:
        """Of one head's queries and keys."""
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class Values:
    """What both sides say of one SAE."""

    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl: float
    ce_recovered: float
    explained_variance: float
    l0: float
    mse: float


def make_model(directory: Path, form: str, sizes: Sizes, seed: int) -> Any:
    """Write a checkpoint and load it; logits spread over about 2, as those of a trained model do."""
    config = AutoConfig.for_model(
        form,
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.d_head,
        intermediate_size=sizes.d_mlp,
        vocab_size=sizes.d_vocab,
        max_position_embeddings=max(2048, sizes.context),
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=LAST_ID,
    )
    if form == "mistral":
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (1.0 if "embed_tokens" in name else 1.5 / weight.shape[-1] ** 0.5))
    model.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.data = weight.data.clone()  # out of the mapped file, whose pages come and go in what is resident
    return model


def make_saes(sizes: Sizes, architecture: str, hook_name: str, norm: float, seed: int, device: str) -> list[SAE[Any]]:
    """SAEs that reconstruct in part: signed coordinates, and random directions that a bias keeps off mostly."""
    saes = []
    for i in range(sizes.saes):
        options = {"k": 32} if architecture == "topk" else {}
        sae = SAE.from_dict(
            {
                "architecture": architecture,
                "d_in": sizes.d_model,
                "d_sae": sizes.d_sae,
                "apply_b_dec_to_input": False,
                "metadata": {"hook_name": hook_name, "hook_head_index": None},
                **options,
            }
        )
        generator = torch.Generator().manual_seed(seed + i)
        with torch.no_grad():
            rows = torch.randn(sizes.d_sae, sizes.d_model, generator=generator)
            rows /= rows.norm(dim=1, keepdim=True)
            coordinates = torch.eye(sizes.d_model)[: sizes.d_sae // 2]
            rows[: 2 * len(coordinates)] = torch.cat([coordinates, -coordinates])
            bias = torch.full((sizes.d_sae,), -3 * norm / sizes.d_model**0.5)
            bias[: 2 * len(coordinates)] = 0
            sae.W_dec.copy_(rows * 0.8)
            sae.W_enc.copy_(rows.T)
            sae.get_parameter("b_enc").copy_(bias)
        saes.append(sae.to(device).eval().requires_grad_(False))
    return saes


class Ours:
    """This package's side: activations onto disk, then every SAE."""

    def __init__(self, splicer: Splicer, tokens: NDArray[np.int64], saes: Sequence[SAE[Any]], directory: Path) -> None:
        """Hold what is loaded once."""
        self._splicer, self._tokens, self._directory = splicer, tokens, directory
        self._device = str(splicer.head.weight.device)
        self._saes = saes
        self.cells: dict[CellKey, CellSums] = {}
        self.norm_scale = 1.0

    def __call__(self) -> None:
        """One evaluation of all SAEs."""
        site = collect_activations(
            self._splicer,
            self._tokens,
            d_model=self._splicer.head.weight.shape[1],
            batch_size=8,
            device=self._device,
            path=self._directory / "acts.npy",
            progress=lambda n: None,
        )
        self.norm_scale = site.norm_scale
        section = Section.whole(self._tokens.shape)
        self.cells = evaluate_model(
            self._splicer,
            self._tokens,
            site,
            section,
            [StoredSAE(str(i), "base", sae, site.norm_scale) for i, sae in enumerate(self._saes)],
            norm_scale=site.norm_scale,
            counted={"kept": section.positions},
            scale_policies=["matched"],
            group_size=len(self._tokens),
            batch_size=8,
            device=self._device,
            progress=lambda n: None,
        )

    def values(self) -> list[Values]:
        """Of the last evaluation, in raw units."""
        found = []
        for i in range(len(self._saes)):
            sums = self.cells[CellKey(str(i), "matched", "kept")].sums
            v = {k: float(x) for k, x in metric_values({k: x.sum() for k, x in sums.items()}).items()}
            names = ("ce_clean", "ce_sae", "ce_zero", "kl", "ce_recovered", "explained_variance", "l0")
            found.append(Values(**{name: v[name] for name in names}, mse=v["mse"] / self.norm_scale**2))
        return found


class TokenRows:
    """What `run_evals` asks of an activations store; without its text and tokenizing, which are not measured."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """Take the rows; both halves of `run_evals` then see the same."""
        self._tokens, self._at = tokens, 0
        self.context_size = tokens.shape[1]
        self.store_batch_size_prompts = len(tokens)

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        """The next n rows, or as many as are left; then from the first again."""
        rows = self._tokens[self._at : self._at + n]
        self._at = self._at + n if self._at + n < len(self._tokens) else 0
        return rows

    def reset_input_dataset(self) -> None:
        """Begin again."""
        self._at = 0


class Theirs:
    """`run_evals`, SAE after SAE."""

    def __init__(
        self, model: Any, hook_name: str, tokens: torch.Tensor, saes: Sequence[SAE[Any]], prompts: int
    ) -> None:
        """Hold what is loaded once."""
        self._model, self._tokens, self._saes, self._hook_name = model, tokens, saes, hook_name
        self._prompts = prompts
        self.found: list[Values] = []

    def __call__(self) -> None:
        """One evaluation of all SAEs."""
        self.found = [self._values(self._evaluate(sae, kl=True, sparsity=True, without=False)) for sae in self._saes]

    def kl_without_last(self) -> list[float]:
        """KL over the positions that have a next token, nats: `run_evals` counts the last one too."""
        all_metrics = [self._evaluate(sae, kl=True, sparsity=False, without=[LAST_ID]) for sae in self._saes]
        return [metrics["model_behavior_preservation"]["kl_div_with_sae"] for metrics in all_metrics]

    def _evaluate(self, sae: SAE[Any], *, kl: bool, sparsity: bool, without: list[int] | bool) -> dict[str, Any]:
        sae.cfg.metadata.hook_name = self._hook_name
        n_batches = -(-len(self._tokens) // self._prompts)
        config = EvalConfig(
            batch_size_prompts=self._prompts,
            n_eval_reconstruction_batches=n_batches,
            compute_kl=kl,
            compute_ce_loss=sparsity,
            n_eval_sparsity_variance_batches=n_batches,
            compute_sparsity_metrics=sparsity,
            compute_variance_metrics=sparsity,
        )
        store: Any = TokenRows(self._tokens)
        return run_evals(sae, store, self._model, ActivationScaler(), config, exclude_special_tokens=without)[0]

    def _values(self, metrics: dict[str, Any]) -> Values:
        loss, quality = metrics["model_performance_preservation"], metrics["reconstruction_quality"]
        return Values(
            ce_clean=loss["ce_loss_without_sae"],
            ce_sae=loss["ce_loss_with_sae"],
            ce_zero=loss["ce_loss_with_ablation"],
            kl=metrics["model_behavior_preservation"]["kl_div_with_sae"],
            ce_recovered=loss["ce_loss_score"],
            explained_variance=quality["explained_variance"],
            l0=metrics["sparsity"]["l0"],
            mse=quality["mse"],
        )


def hooked_transformer(model: Any, directory: Path, context: int) -> Any:
    """SAELens's default model, of the same weights, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained.weight_conversions.mistral import convert_mistral_weights
    from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights

    fields = convert_hf_model_config(str(directory))
    ours = {"n_ctx": context, "dtype": torch.float32, "device": str(model.device), "tokenizer_name": None}
    config = HookedTransformerConfig.from_dict({**fields, **ours})
    convert = convert_mistral_weights if model.config.model_type == "mistral" else convert_qwen2_weights
    hooked = HookedTransformer(config, move_to_device=True)
    with torch.no_grad():
        hooked.load_state_dict(convert(model, config), strict=False)
    return hooked.eval().requires_grad_(False)


def differences(ours: Sequence[Values], theirs: Sequence[Values], kl: Sequence[float]) -> dict[str, float]:
    """Largest difference of each metric over the SAEs, relative to it."""

    def largest(pairs: Sequence[tuple[float, float]]) -> float:
        return max(abs(a - b) / abs(b) for a, b in pairs)

    found = {"kl": largest([(o.kl, k) for o, k in zip(ours, kl, strict=True)])}
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_recovered", "explained_variance", "l0", "mse"):
        found[name] = largest([(getattr(o, name), getattr(t, name)) for o, t in zip(ours, theirs, strict=True)])
    return found


def check(found: dict[str, float], side: str) -> None:
    """End the benchmark when the two sides do not say the same."""
    for name, value in found.items():
        kind = "kl" if name == "kl" else "ce" if name in ("ce_clean", "ce_sae", "ce_zero") else "ratio"
        if not value <= RELATIVE[kind]:
            sys.exit(f"{name} differs from {side} by {value:.1e} (relative), allowed {RELATIVE[kind]:.0e}")


def products(sizes: Sizes) -> list[tuple[float, tuple[int, int, int]]]:
    """The matrix products that the work needs: how many of each shape `[m k] @ [k n]`."""
    tokens = sizes.sequences * sizes.context
    rows = min(tokens, 2048)
    d, d_kv = sizes.d_model, sizes.d_head * sizes.n_kv_heads

    def of_all_tokens(k: int, n: int, passes: float) -> tuple[float, tuple[int, int, int]]:
        return passes * tokens / rows, (rows, k, n)

    layers = sizes.site + (1 + sizes.saes) * (sizes.n_layers - sizes.site)
    # causal attention needs half of both products of each head
    heads = layers * sizes.sequences * sizes.n_heads / 2
    return [
        of_all_tokens(d, d, 2 * layers),
        of_all_tokens(d, d_kv, 2 * layers),
        of_all_tokens(d, sizes.d_mlp, 2 * layers),
        of_all_tokens(sizes.d_mlp, d, layers),
        (heads, (sizes.context, sizes.d_head, sizes.context)),
        (heads, (sizes.context, sizes.context, sizes.d_head)),
        # the clean pass's logits and mean rows, each splice's logits
        of_all_tokens(d, sizes.d_vocab, 1 + sizes.saes),
        of_all_tokens(sizes.d_vocab, d, 1),
        of_all_tokens(d, sizes.d_sae, sizes.saes),
        of_all_tokens(sizes.d_sae, d, sizes.saes),
    ]


def gemm_bound(sizes: Sizes, device: str) -> float:
    """Seconds of the matrix products that the work needs, each at the rate measured for its shape."""
    return sum(number * matmul_seconds(*shape, device=device) for number, shape in products(sizes))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=["mistral", "qwen2"], default="mistral", help="architecture of the model")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--site", type=int, default=4, help="layer whose input is the site, at least 1")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--d-mlp", type=int, default=1792)
    parser.add_argument("--d-vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--saes", type=int, default=4)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--architecture", choices=["standard", "topk"], default="standard", help="of the SAEs")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[1, 2], help="batch sizes to try for SAELens at its best"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="where the results are written")
    return parsed(parser)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, of which --site, --layers and --prompts fit together; else the script ends."""
    args = parser.parse_args()
    if not 1 <= args.site < args.layers:
        parser.error(f"--site: got {args.site}; expected at least 1, and less than --layers, {args.layers}")
    if min(args.prompts) < 1:
        parser.error(f"--prompts: got {min(args.prompts)}; expected at least 1")
    return args


def main() -> None:
    """Run it."""
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.getLogger("sae_transfer").setLevel(logging.WARNING)
    sizes = Sizes(
        args.d_model, args.layers, args.site, args.heads, args.kv_heads, args.d_mlp, args.d_vocab, args.context,
        args.sequences, args.saes, args.d_sae,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args, sizes, Path(scratch))
    if args.json:
        write_json(args.json, results)
        say(f"written to {args.json}")


def measure(args: argparse.Namespace, sizes: Sizes, directory: Path) -> dict[str, Any]:
    """Make the parts, compare the numbers, then time and memory of every side."""
    started = time.time()
    model = make_model(directory / "model", args.form, sizes, args.seed).to(args.device)
    if model.device.type == "cuda":
        repeat_keys(model)
    hook_name = f"blocks.{sizes.site}.hook_resid_pre"
    splicer = open_splicer(model, hook_name, resolve(str(directory / "model")))
    tokens = np.random.default_rng(args.seed).integers(2, sizes.d_vocab, (sizes.sequences, sizes.context))
    tokens[:, 0], tokens[:, -1] = 0, LAST_ID
    on_device = torch.from_numpy(tokens).to(args.device)
    norm = float(splicer.run_to(on_device[:1]).norm(dim=-1).mean())
    saes = make_saes(sizes, args.architecture, hook_name, norm, args.seed, args.device)

    ours = Ours(splicer, tokens, saes, directory)
    proxy_hook = f"model.layers.{sizes.site - 1}"
    proxy = HookedProxyLM(model, None, hook_names=[proxy_hook])  # pyright: ignore[reportArgumentType]
    hooked = hooked_transformer(model, directory / "model", sizes.context)
    sides: dict[str, Callable[[], None]] = {"sae_transfer": ours}
    default = min(DEFAULT_PROMPTS, sizes.sequences)
    sides[f"run_evals, defaults (HookedTransformer, {default} prompts)"] = Theirs(
        hooked, hook_name, on_device, saes, default
    )
    for prompts in sorted({min(n, sizes.sequences) for n in args.prompts}):
        name = f"run_evals, tuned (Hugging Face with SDPA, {prompts} prompts)"
        sides[name] = Theirs(proxy, proxy_hook, on_device, saes, prompts)

    memory = {}
    for name, side in sides.items():
        side()
        memory[name] = extra_peak_bytes(side, args.device)
        say(f"{time.time() - started:5.0f} s  {name}: {memory[name] / 2**20:.0f} MiB")
    tuned = next(side for name, side in sides.items() if "tuned" in name)
    assert isinstance(tuned, Theirs)
    kl = tuned.kl_without_last()
    agreement = {}
    for name, side in sides.items():
        if isinstance(side, Theirs):
            agreement[name] = differences(ours.values(), side.found, kl)
            check(agreement[name], name)
    say(f"{time.time() - started:5.0f} s  the numbers agree: {ours.values()[0]}")
    times = alternating(sides, args.repeats, device=args.device, warm_ups=0)
    bound = gemm_bound(sizes, args.device)
    return report(args, sizes, times, memory, agreement, bound)


def report(
    args: argparse.Namespace,
    sizes: Sizes,
    times: dict[str, Spread],
    memory: dict[str, int],
    agreement: dict[str, dict[str, float]],
    bound: float,
) -> dict[str, Any]:
    """Print the table; the same as data."""
    mine = times["sae_transfer"]
    ratios = {name: ratio(spread, mine) for name, spread in times.items()}
    rows = [
        (
            name,
            times[name],
            ratios[name],
            f"{memory[name] / 2**20:.0f}",
            f"{memory[name] / memory['sae_transfer']:.1f}",
            " ".join(f"{agreement[name][key]:.0e}" for key in ("ce_sae", "kl", "ce_recovered", "explained_variance"))
            if name in agreement
            else "",
        )
        for name in times
    ]
    say(str(sizes))
    say(str(machine()))
    header = ("side", "time s", "times ours", "extra MiB", "times ours", "difference CE, KL, CE recovered, EV")
    say(table(header, rows))
    say(f"matrix products alone: {bound:.3g} s, {bound / mine.median:.2f} of our time")
    return {
        "options": {key: value for key, value in vars(args).items() if key != "json"},
        "seconds": times,
        "ratio": ratios,
        "extra_bytes": memory,
        "differences": agreement,
        "gemm_seconds": bound,
        "gemm_fraction": bound / mine.median,
    }


if __name__ == "__main__":
    main()
