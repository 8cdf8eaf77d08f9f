"""Run directories as the stages leave them, small and made up, for the report's tests."""

import json
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from sae_transfer.config import Study
from sae_transfer.report.columns import METRICS

ROWS = "cross_eval/rows.csv"
TABLES = "report/tables"
FIGURES = "report/figures"
GAP_METRICS = [metric for metric in METRICS if metric != "frac_alive"]

# Mistral-7B in the post's result files (explained variance and MSE shortened): L0, CE recovered, clean, SAE, EV, MSE.
POST = {
    ("base", "base"): (95.189697265625, 0.987123429775238, 1.5194883346557617, 1.633112907409668, 0.6816638, 1014.08),
    ("chat", "base"): (
        72.17414855957031,
        0.9682628512382507,
        1.5194883346557617,
        1.7996500730514526,
        0.52658,
        1502.866,
    ),
    ("chat", "chat"): (101.691970825195, 0.9901690483093262, 1.7047595977783203, 1.789597749710083, 0.6922954, 1054.82),
    ("base", "chat"): (126.12207031, 0.9885839819908142, 1.7047595977783203, 1.8031346797943115, 0.6095952, 1327.69),
}


def row(trained_on: str, model: str, **changes: object) -> dict[str, Any]:
    """A row of rows.csv as the post's Mistral-7B gives it."""
    l0, recovered, clean, sae, explained, mse = POST.get(
        (trained_on, model), (86.04, 0.9875, 1.7, 1.81, 0.6543, 1189.2)
    )
    metrics = dict.fromkeys(METRICS, 0.5) | {
        "l0": l0,
        "ce_recovered": recovered,
        "ce_clean": clean,
        "ce_sae": sae,
        "ce_delta": sae - clean,
        "ce_zero": 10.373491287231445,
        "explained_variance_per_token": explained,
        "mse": mse,
    }
    metrics |= {name: float(str(value or "nan")) for name, value in changes.items() if name in metrics}
    n_outliers = 48 if model == "base" else 51
    of = {
        "section": "pile",
        "sae": f"{trained_on}-standard-w131072-l1_3-s0",
        "sae_trained_on": trained_on,
        "architecture": "standard",
        "d_sae": 131072,
        "sparsity_key": "l1_coefficient",
        "sparsity_value": 3.0,
        "seed": 0,
        "model": model,
        "hook_name": "blocks.16.hook_resid_pre",
        "dtype": "float32",
        "scale": "matched",
        "norm_scale": 11.576960263941084,
        "sae_scale": 7.931667509979551,
        "outliers": "excluded",
        "outlier_threshold": 200.0,
        "averaging": "pooled",
        "n_tokens": 98304 - n_outliers,
        "n_loss_tokens": 98256,
        "n_outliers": n_outliers,
        "n_sequences": 48,
    }
    low = {f"{name}_low": 0.9 * value for name, value in metrics.items()}
    high = {f"{name}_high": 1.1 * value for name, value in metrics.items()}
    return {**of, **metrics, **low, **high, **changes}


def gap(**changes: object) -> dict[str, Any]:
    """A row of transfer.csv, with some of its metrics."""
    return {
        "section": "pile",
        "model": "chat",
        "scale": "matched",
        "outliers": "excluded",
        "transferred": "base-standard-w131072-l1_3-s0",
        "native": "chat-standard-w131072-l1_3-s0",
        "ce_delta_gap": 0.01234,
        "ce_delta_low": 0.00996,
        "ce_delta_high": 0.015,
        "explained_variance_per_token_gap": -0.0827,
        "explained_variance_per_token_low": -0.09,
        "explained_variance_per_token_high": -0.00001,
        "ce_clean_gap": 0.0,
        "ce_clean_low": 0.0,
        "ce_clean_high": 0.0,
        **changes,
    }


def seed_gap(value: float, **changes: object) -> dict[str, Any]:
    """A row of seeds.csv: two chat SAEs on the chat model."""
    ends = {"first": "chat-standard-w131072-l1_3-s0", "second": "chat-standard-w131072-l1_3-s1"}
    found = gap(ce_delta_gap=value, ce_delta_low=value - 0.001, ce_delta_high=value + 0.001, **ends, **changes)
    return {name: entry for name, entry in found.items() if name not in ("transferred", "native")}


def post_rows(**changes: object) -> list[dict[str, Any]]:
    """The post's four cells in another order than its own, as a stage may write them."""
    return [row(trained_on, model, **changes) for trained_on, model in sorted(POST)]


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows), columns=columns).to_csv(path, index=False)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def make_run(
    run: Path,
    rows: list[dict[str, Any]],
    gaps: list[dict[str, Any]] | None = None,
    seeds: list[dict[str, Any]] | None = None,
) -> Path:
    """A run that was cross-evaluated and nothing else."""
    write_csv(run / ROWS, rows)
    write_csv(run / "cross_eval/transfer.csv", [gap()] if gaps is None else gaps, list(gap()))
    if seeds is not None:
        write_csv(run / "cross_eval/seeds.csv", seeds)
    return run


def write_study(run: Path, **changes: Any) -> Study:
    """A resolved study file."""
    study = Study.model_validate(
        {
            "name": "toy",
            "pair": {"base": "toy/base", "chat": "toy/chat"},
            "site": {"layer": 16, "hook": "resid_pre"},
            "tokens": {"dataset": "pile.txt", "context_size": 2048},
            "saes": [{"widths": [1024], "l1_coefficient": [2, 4, 8], "seeds": [0, 1]}],
            "train": {"tokens": "4M"},
            "finetune": {"tokens": ["50k", "100k", "200k"], "control": True},
            "instruct": {},
            **changes,
        }
    )
    run.mkdir(parents=True, exist_ok=True)
    (run / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    return study


def full_run(run: Path, **study: Any) -> Path:
    """A run with every stage done: three sparsities, two seeds, three fine-tuning budgets with controls."""
    write_study(run, **study)
    write_json(run / "scales.json", {"base": 0.29, "chat": 2.42, "measured_on": "4,000,000 training tokens"})
    write_json(
        run / "manifest.json",
        {
            "command": ["sae-transfer", "run", "toy.yaml"],
            "packages": {"sae-lens": "6.54.12", "torch": "2.13.0"},
            "hardware": {"machine": "x86_64", "cpus": 2},
            "git": {"commit": "859bb67", "dirty": False},
            "models": {"base": {"source": "toy/base", "revision": "abc123"}, "chat": {"source": "toy/chat"}},
            "token_set": {"fingerprint": "0188b22f", "dataset": "pile.txt"},
            "seeds": {"tokens": 0, "saes": [0, 1]},
        },
    )
    for place, stage in enumerate(("tokens", "train-base", "train-chat", "cross-eval")):
        finished = f"2026-01-01T00:0{place}:00+00:00"
        write_json(run / f"stages/{stage}.json", {"inputs": {}, "finished": finished, "seconds": 10.5 * place})
    rng = np.random.default_rng(0)
    _cells(run, rng)
    _instruct(run, rng)
    _outliers(run, rng)
    _weights(run, rng)
    _training(run, rng)
    return run


def _cell(
    rng: np.random.Generator, sae: str, trained_on: str, model: str, l1: float, seed: int, **more: Any
) -> dict[str, Any]:
    transferred, kept = trained_on != model, more.get("outliers") == "kept"
    l0 = (300 if transferred else 260) / l1 * rng.uniform(0.97, 1.03)
    delta = (0.04 + 0.03 * l1 + 0.06 * transferred * kept + 0.02 * transferred) * rng.uniform(0.96, 1.04)
    clean, zero = (2.31, 10.4) if model == "base" else (2.55, 10.4)
    explained = 0.9 - 0.03 * l1 - 0.05 * transferred
    own = {
        "l0": l0,
        "ce_clean": clean,
        "ce_zero": zero,
        "ce_mean": 8.2,
        "ce_delta": delta,
        "ce_sae": clean + delta,
        "ce_recovered": 1 - delta / (zero - clean),
        "kl": 1.1 * delta,
        "top1_agreement": 0.9 - delta / 3,
        "explained_variance_per_token": explained,
        "explained_variance": explained + 0.02,
        "mse": 1000 * (1 - explained) * (40 if kept and transferred else 1),
        "frac_alive": 0.93,
        **{key: value for key, value in more.items() if key in METRICS},
    }
    ends = {
        f"{name}_{end}": value * sign for name, value in own.items() for end, sign in (("low", 0.98), ("high", 1.02))
    }
    ends |= {"ce_recovered_low": own["ce_recovered"] - 0.002, "ce_recovered_high": own["ce_recovered"] + 0.002}
    where = {"sae": sae, "d_sae": 1024, "sparsity_value": l1, "seed": seed, "n_sequences": 48}
    return row(trained_on, model, **where, **own, **ends, **{k: v for k, v in more.items() if k not in METRICS})


def _cells(run: Path, rng: np.random.Generator) -> None:
    rows = []
    for outliers in ("excluded", "kept"):
        for trained_on, l1, seed, model in product(("base", "chat"), (2.0, 4.0, 8.0), (0, 1), ("base", "chat")):
            sae = f"{trained_on}-standard-w1024-l1_{l1:g}-s{seed}"
            rows.append(_cell(rng, sae, trained_on, model, l1, seed, outliers=outliers))
        for (who, trained_on), (tokens, better) in product(
            (("finetuned", "finetuned"), ("control", "chat")), ((50, 0.0), (100, 0.03), (200, 0.05))
        ):
            sae = f"{who}-standard-w1024-l1_4-s0-{tokens}k"
            own = {"ce_delta": (0.25 if who == "finetuned" else 0.6) - better, "l0": 70 - 100 * better}
            own |= {"ce_sae": 2.55 + own["ce_delta"], "ce_recovered": 1 - own["ce_delta"] / 7.85}
            rows.append(_cell(rng, sae, trained_on, "chat", 4.0, 0, outliers=outliers, **own))
    write_csv(run / ROWS, rows)
    write_csv(run / "cross_eval/transfer.csv", _gaps(rows, seeds=False))
    write_csv(run / "cross_eval/seeds.csv", _gaps(rows, seeds=True))


def _gaps(rows: list[dict[str, Any]], *, seeds: bool) -> list[dict[str, Any]]:
    found = []
    for one, other in product(rows, rows):
        same = all(one[key] == other[key] for key in ("section", "model", "scale", "outliers", "sparsity_value"))
        if seeds:
            paired = one["sae_trained_on"] == other["sae_trained_on"] and (one["seed"], other["seed"]) == (0, 1)
        else:
            paired = one["seed"] == other["seed"] and one["sae_trained_on"] != one["model"] == other["sae_trained_on"]
        named = one["sae"].startswith(("base", "chat", "finetuned")) and other["sae"].startswith(("base", "chat"))
        if same and paired and named and not (seeds and one["sae"].startswith("finetuned")):
            ends = dict(
                zip(
                    ("first", "second") if seeds else ("transferred", "native"), (one["sae"], other["sae"]), strict=True
                )
            )
            of = {key: one[key] for key in ("section", "model", "scale", "outliers")} | ends
            for metric in GAP_METRICS:
                value = one[metric] - other[metric]
                width = 0.1 * abs(value) + 1e-4
                of |= {f"{metric}_gap": value, f"{metric}_low": value - width, f"{metric}_high": value + width}
            found.append(of)
    return found


def make_sweep(
    directory: Path,
    *,
    layers: Iterable[int] = (6, 13),
    widths: Iterable[int] = (512, 1024),
    sparsities: Iterable[float] = (2.0, 4.0, 8.0),
    pairs: Iterable[str] = ("toy",),
    sparsity_in_grid: bool = False,
) -> list[Path]:
    """A sweep's directory in which every cell has been cross-evaluated.

    Returns:
        The cells' run directories, in order.
    """
    rng = np.random.default_rng(0)
    listed = []
    alone = [[value] for value in sparsities] if sparsity_in_grid else [list(sparsities)]
    for pair, layer, width, own in product(pairs, layers, widths, alone):
        cell_id = f"{pair}-l{layer}-w{width}" + f"-l1_{own[0]:g}" * sparsity_in_grid
        settings: dict[str, Any] = {"site.layer": layer, "saes.widths": [width]}
        if sparsity_in_grid:
            settings["saes.l1_coefficient"] = own
        run = directory / "cells" / cell_id
        write_study(
            run,
            name=pair,
            pair={"base": f"{pair}/base", "chat": f"{pair}/chat"},
            site={"layer": layer, "hook": "resid_pre"},
            saes=[{"widths": [width], "l1_coefficient": own}],
        )
        write_json(run / "manifest.json", {"git": {"commit": "859bb67", "dirty": False}, "started": cell_id})
        where = {"d_sae": width, "hook_name": f"blocks.{layer}.hook_resid_pre"}
        rows = []
        for outliers, trained_on, l1, model in product(("excluded", "kept"), ("base", "chat"), own, ("base", "chat")):
            sae = f"{trained_on}-standard-w{width}-l1_{l1:g}-s0"
            # Deeper sites lose more, wider SAEs less.
            lost = (0.004 * l1 + 0.001 * layer + 0.01 * (trained_on != model)) * (512 / width) ** 0.3
            own_metrics = {"ce_recovered": 1 - lost, "outliers": outliers}
            rows.append(_cell(rng, sae, trained_on, model, l1, 0, **own_metrics) | where)
        write_csv(run / ROWS, rows)
        write_csv(run / "cross_eval/transfer.csv", _gaps(rows, seeds=False))
        listed.append({"id": cell_id, "study": pair, "settings": settings})
    write_json(directory / "cells.json", listed)
    return [directory / "cells" / entry["id"] for entry in listed]


def _instruct(run: Path, rng: np.random.Generator) -> None:
    rows = []
    for section, outliers, trained_on in product(
        ("rollout", "user_prompt", "control"), ("excluded", "kept"), ("base", "chat")
    ):
        sae = f"{trained_on}-standard-w1024-l1_4-s0"
        rows.append(_cell(rng, sae, trained_on, "chat", 4.0, 0, section=section, outliers=outliers))
    write_csv(run / "instruct/rows.csv", rows)
    write_csv(run / "instruct/transfer.csv", _gaps(rows, seeds=False))
    write_json(
        run / "instruct/summary.json",
        {
            "n_drawn": 100,
            "n_with_input_dropped": 44,
            "n_empty": 1,
            "n_used": 55,
            "n_unfinished": 40,
            "share_unfinished": 40 / 55,
            "template": "[INST] {instruction} [/INST]",
            "max_new_tokens": 64,
            "source": "generated",
        },
    )


KIND_SHARES = {
    "base": {"bos_first": 0.4, "bos_later": 0.23, "first_newline": 0.26, "paragraph": 0.11},
    "chat": {"bos_first": 0.53, "newline": 0.47},
}
KIND_TOKENS = {
    "bos_first": ["'<s>'"],
    "bos_later": ["'<s>'"],
    "first_newline": [r"'\n'", r"'\n\n'"],
    "newline": [r"'\n'", r"'.\n'"],
    "paragraph": ["'¶'", "'§'"],
    "early": ["'$x$'", "'The'"],
    "other": [f"'w{i}'" for i in range(60)] + ["'$y_i$'", "'日本'"],
}


def _outliers(run: Path, rng: np.random.Generator) -> None:
    kinds, tokens, bins, sweep, scatter = [], [], [], [], []
    for model, shares in KIND_SHARES.items():
        n_outliers = 184 if model == "base" else 215
        for kind in KIND_TOKENS:
            share = shares.get(kind, 0.0)
            of = {"model": model, "norm_scale": 0.3, "threshold": 200.0, "threshold_source": "given", "n_tokens": 98304}
            counts = {"n_outliers": n_outliers, "fraction": n_outliers / 98304, "n_kind": round(share * n_outliers)}
            kinds.append({**of, "kind": kind, **counts, "share": share})
            norms = np.exp(
                rng.normal(math.log(900) if share else math.log(45), 0.3, size=round(4000 * (share or 0.02)))
            )
            if kind == "other":
                norms = np.exp(rng.normal(math.log(62), 0.22, size=90_000))
            counted, edges = np.histogram(norms, np.geomspace(10, 4000, 61))
            bins += [
                {"model": model, "kind": kind, "low": low, "high": high, "count": n}
                for low, high, n in zip(edges, edges[1:], counted, strict=False)
                if n
            ]
            if share:
                token = {"model": model, "kind": kind, "token_id": 13, "token": KIND_TOKENS[kind][0]}
                tokens.append({**token, "count": round(share * n_outliers), "mean_norm": 900.5, "max_norm": 2100.25})
            sae = f"{'chat' if model == 'base' else 'base'}-standard-w1024-l1_4-s0"
            for norm in norms[:800]:
                error = 0.4 * norm**1.2 * rng.lognormal(0, 0.3) * (30 if share else 1)
                where = {"sequence": 3, "position": 17, "scaled_norm": norm, "squared_error": error}
                scatter.append(
                    {"model": model, "sae": sae, "kind": kind, "token": rng.choice(KIND_TOKENS[kind]), **where}
                )
        for threshold, trained_on in product((50, 100, 200, 400, 800, 1600), ("base", "chat")):
            sae = f"{trained_on}-standard-w1024-l1_4-s0"
            removed = max(0.0, 0.4 * (50 / threshold) ** 3 - 1e-5)
            cell = _cell(rng, sae, trained_on, model, 4.0, 0)
            cell["mse"] *= 1 + (threshold / 300) ** 2 * (trained_on != model)
            of = {"threshold": threshold, "sae": sae, "sae_trained_on": trained_on, "model": model}
            sweep.append({**of, "fraction_removed": removed, **{metric: cell[metric] for metric in METRICS}})
    for name, rows in (
        ("rows", kinds),
        ("tokens", tokens),
        ("histogram", bins),
        ("thresholds", sweep),
        ("scatter", scatter),
    ):
        write_csv(run / f"outliers/{name}.csv", rows)
    explanation = "auto: no position of either model has a scaled norm between 160 and 240, a factor 1.5"
    write_json(run / "outliers/auto.json", {"threshold": 200.0, "low": 160, "high": 240, "explanation": explanation})


def _weights(run: Path, rng: np.random.Generator) -> None:
    rows = []
    for layer in [None, *range(8)]:
        kinds = (
            ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out", "norm")
            if layer is not None
            else ("embedding", "norm", "unembedding")
        )
        for place, kind in enumerate(kinds):
            ratio = 0.02 * (place + 1) * rng.uniform(0.8, 1.2) * (1 + 0.1 * (layer or 0))
            of = {"layer": layer, "kind": kind, "n_parameters": 16384, "norm_base": 12.5, "norm_chat": 12.6}
            rows.append({**of, "norm_difference": 12.5 * ratio, "relative_difference": ratio, "cosine": 0.99})
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    (run / "weights").mkdir(parents=True)
    table.to_csv(run / "weights/by_kind.csv", index=False)
    spread = {"mean": 0.97, "median": 0.98, "p5": 0.9, "p95": 0.995}
    found = {"n_positions": 98304, "cosine": spread, "relative_distance": spread, "relative_distance_scaled": spread}
    write_json(run / "weights/activations.json", {"kept": found, "excluded": found})


def _training(run: Path, rng: np.random.Generator) -> None:
    saes = [
        (f"{side}-standard-w1024-l1_{l1}-s{seed}", side, "trained", 4_000_000)
        for side, l1, seed in product(("base", "chat"), (2, 4, 8), (0, 1))
    ]
    for tokens, (who, trained_on) in product((50, 100, 200), (("finetuned", "finetuned"), ("control", "chat"))):
        saes.append((f"{who}-standard-w1024-l1_4-s0-{tokens}k", trained_on, who, 1000 * tokens))
    for sae, trained_on, who, tokens in saes:
        write_json(run / f"saes/{sae}/provenance.json", {"trained_on": trained_on, "role": who, "tokens": tokens})
        lines = []
        for step in range(1, 61):
            share = step / 60
            loss = 200 + 1800 * math.exp(-6 * share) * rng.uniform(0.95, 1.05)
            lines.append(
                {
                    "step": step,
                    "tokens": round(share * tokens),
                    "loss": loss,
                    "l0": 40 + 800 * math.exp(-8 * share),
                    "explained_variance": 0.8 - 0.9 * math.exp(-5 * share),
                }
            )
        (run / f"saes/{sae}/train_log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
