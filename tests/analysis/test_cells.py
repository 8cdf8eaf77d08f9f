"""Cells: known answers, and a brute-force computation that shares no code with the one tested."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from sae_transfer.analysis.cells import CellKey, CellSums, ScalePolicy, Section, evaluate_model
from sae_transfer.analysis.metrics import Bootstrap
from sae_transfer.analysis.norms import counted_positions, is_outlier
from sae_transfer.analysis.site import collect_activations
from sae_transfer.models.pair import load_model, resolve
from sae_transfer.models.passes import AtOnce
from sae_transfer.models.splice import open_splicer
from sae_transfer.saes.store import StoredSAE
from tests.checkpoints import make_checkpoint
from tests.saes.saes import identity_sae, random_training_sae, save_inference

POS, N_SEQ = 12, 10
POLICIES: tuple[ScalePolicy, ...] = ("matched", "raw")


def token_rows() -> np.ndarray:
    rows = np.random.default_rng(0).integers(3, 250, (N_SEQ, POS)).astype(np.uint16)
    rows[:, 0] = 0
    return rows


def evaluate(
    directory: Path,
    tmp_path: Path,
    saes: list[StoredSAE],
    *,
    hook: str = "blocks.1.hook_resid_pre",
    norm_scale: float = 0.9,
    threshold: float | None = None,
    scales: tuple[Any, ...] = ("matched",),
    group_size: int = N_SEQ,
    batch_size: int = 4,
    device: str = "cpu",
) -> dict[CellKey, CellSums]:
    checkpoint = resolve(str(directory))
    splicer = open_splicer(load_model(checkpoint, dtype="float32", device=device), hook, checkpoint)
    rows = token_rows()
    site = collect_activations(
        splicer, rows, d_model=32, batch_size=4, device=device, path=tmp_path / "acts.npy", progress=lambda n: None
    )
    section = Section.whole(rows.shape)
    return evaluate_model(
        splicer,
        rows,
        site,
        section,
        saes,
        norm_scale=norm_scale,
        counted=counted_positions(
            section.positions, is_outlier(site.norms, norm_scale, threshold), ("excluded", "kept")
        ),
        scale_policies=scales,
        group_size=group_size,
        batch_size=batch_size,
        device=device,
        progress=lambda n: None,
    )


def norm_quantile(directory: Path, quantile: float) -> float:
    """Of the raw activations at the input of layer 1; a threshold there splits the positions."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        hidden = model(torch.from_numpy(token_rows().astype(np.int64)), output_hidden_states=True).hidden_states[1]
    return hidden.norm(dim=-1).quantile(quantile).item()


def values(cell: CellSums, averaging: Any = "pooled", batch_size: int = 1) -> dict[str, float]:
    return Bootstrap(N_SEQ, averaging, batch_size).summarise(cell.sums).values


def stored(sae: SAE[Any], scale: float | None = 0.9, name: str = "s") -> StoredSAE:
    return StoredSAE(name, "base", sae, scale)


def brute_force(
    directory: Path, sae: SAE[Any], factor: float, c: float, threshold: float, excluded: bool
) -> dict[str, float]:
    """METHOD's definitions on plain Hugging Face modules and logits, in one pass each."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    tokens = torch.from_numpy(token_rows().astype(np.int64))
    layer = model.model.layers[1]

    def with_residual(residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen = []

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            seen.append(args[0])
            return ((residual, *args[1:]), kwargs) if residual is not None else None

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        logits = model(input_ids=tokens).logits[:, :-1]
        handle.remove()
        return logits, seen[0]

    clean, x = with_residual(None)
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    if excluded:
        counted = (c * x).norm(dim=-1) <= threshold
    features = sae.encode(factor * x)
    recon = sae.decode(features) / factor
    spliced = with_residual(torch.where(counted[..., None], recon, x))[0]
    xs, rs = (c * x)[counted].double(), (c * recon)[counted].double()
    mu = xs.mean(0)
    zero = with_residual(torch.zeros_like(x))[0]
    mean = with_residual((mu / c).float().expand_as(x))[0]
    targets = tokens[:, 1:].flatten()

    def ce(logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets).item()

    error, spread = (xs - rs).square().sum(-1), (xs - mu).square().sum(-1)
    log_p, log_q = clean.double().log_softmax(-1), spliced.double().log_softmax(-1)
    return {
        "l0": (features > 0).sum(-1)[counted].double().mean().item(),
        "mse": error.mean().item(),
        "explained_variance": (1 - error.sum() / spread.sum()).item(),
        "explained_variance_per_token": (1 - error / spread).mean().item(),
        "ce_clean": ce(clean),
        "ce_sae": ce(spliced),
        "ce_delta": ce(spliced) - ce(clean),
        "ce_zero": ce(zero),
        "ce_mean": ce(mean),
        "ce_recovered": (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean)),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (clean.argmax(-1) == spliced.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "mistral"])
def test_every_metric_equals_the_brute_force_computation(architecture: str, model: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", model)
    save_inference(random_training_sae(architecture, b_dec=architecture == "standard"), tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae")
    c, c_s = 0.9, 0.6
    threshold = c * norm_quantile(directory, 0.8)
    cells = evaluate(
        directory, tmp_path, [stored(sae, c_s)], norm_scale=c, threshold=threshold, scales=("matched", "raw")
    )
    for key, cell in cells.items():
        factor = c / c_s if key.scale == "matched" else 1.0
        expected = brute_force(directory, sae, factor, c, threshold, key.outliers == "excluded")
        ours = values(cell)
        if key.outliers == "excluded":
            assert cell.sums["n_tokens"].sum() == pytest.approx(0.8 * N_SEQ * POS, abs=2)
        for metric, value in expected.items():
            tolerance = {"mse": 2e-5 * value, "l0": 2 / (N_SEQ * POS)}.get(metric, 2e-6)
            assert ours[metric] == pytest.approx(value, abs=tolerance), (key, metric)


@pytest.mark.parametrize("model", ["llama", "gpt_neox", "gemma2"])
def test_on_a_gpu_the_metrics_are_those_of_the_cpu(model: str, gpu: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", model)
    save_inference(random_training_sae("standard"), tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae")
    threshold = 0.9 * norm_quantile(directory, 0.8)
    expected, found = (
        evaluate(directory, tmp_path, [stored(sae.to(device), 0.6)], threshold=threshold, device=device)
        for device in ("cpu", gpu)
    )
    for key, cell in expected.items():
        for metric, value in values(cell).items():
            # a feature at the edge, a token between two others
            tolerance = 2 / (N_SEQ * POS) if metric in ("l0", "top1_agreement") else 1e-4 * abs(value) + 1e-5
            assert values(found[key])[metric] == pytest.approx(value, abs=tolerance), (key, metric)


def test_an_identity_sae_changes_nothing(tmp_path: Path) -> None:
    cells = evaluate(make_checkpoint(tmp_path / "m"), tmp_path, [stored(identity_sae())])
    ours = values(cells[CellKey("s", "matched", "kept")])
    assert ours["mse"] == 0 and ours["ce_delta"] == 0 and ours["kl"] == 0
    assert ours["explained_variance"] == 1 and ours["explained_variance_per_token"] == 1
    assert ours["ce_recovered"] == 1 and ours["top1_agreement"] == 1
    assert ours["l0"] == 32  # of x and -x exactly one is positive
    assert cells[CellKey("s", "matched", "kept")].alive.all()


def test_a_halved_decoder_has_the_mse_and_explained_variance_known_by_hand(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    c = 1.3
    cells = evaluate(directory, tmp_path, [stored(identity_sae(decoder_scale=0.5), c)], norm_scale=c)
    x = c * np.lib.format.open_memmap(tmp_path / "acts.npy").reshape(-1, 32).astype(np.float64)
    ours = values(cells[CellKey("s", "matched", "kept")])
    squares, spread = (x**2).sum(1) / 4, ((x - x.mean(0)) ** 2).sum(1)  # x - x/2 = x/2
    assert ours["mse"] == pytest.approx(squares.mean(), rel=1e-6)
    assert ours["explained_variance"] == pytest.approx(1 - squares.sum() / spread.sum(), rel=1e-6)
    assert ours["explained_variance_per_token"] == pytest.approx((1 - squares / spread).mean(), rel=1e-6)


@pytest.mark.parametrize("model", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("hook", ["resid_pre", "resid_mid", "resid_post"])
def test_zero_ablation_ce_is_log_vocab_without_biases(model: str, hook: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", model)
    cells = evaluate(directory, tmp_path, [stored(identity_sae())], hook=f"blocks.1.hook_{hook}")
    d_vocab = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size
    assert values(cells[CellKey("s", "matched", "kept")])["ce_zero"] == pytest.approx(np.log(d_vocab), abs=1e-5)


@pytest.mark.parametrize(("model", "hook"), [("qwen2", "resid_pre"), ("llama", "attn_out"), ("llama", "mlp_out")])
def test_zero_ablation_ce_is_not_log_vocab_with_biases_or_beside_the_stream(
    model: str, hook: str, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "m", model)
    cells = evaluate(directory, tmp_path, [stored(identity_sae())], hook=f"blocks.1.hook_{hook}")
    d_vocab = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size
    assert abs(values(cells[CellKey("s", "matched", "kept")])["ce_zero"] - np.log(d_vocab)) > 0.01


def test_without_outliers_excluding_and_keeping_them_are_the_same(tmp_path: Path) -> None:
    save_inference(random_training_sae("standard"), tmp_path / "sae")
    cells = evaluate(make_checkpoint(tmp_path / "m"), tmp_path, [stored(SAE.load_from_disk(tmp_path / "sae"))])
    assert values(cells[CellKey("s", "matched", "kept")]) == values(cells[CellKey("s", "matched", "excluded")])


def test_matched_and_raw_agree_on_an_saes_own_model_and_differ_elsewhere(tmp_path: Path) -> None:
    save_inference(random_training_sae("standard"), tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae")
    directory = make_checkpoint(tmp_path / "m")
    for c_s, is_same in ((0.9, True), (0.5, False), (None, True)):
        cells = evaluate(directory, tmp_path, [stored(sae, c_s)], norm_scale=0.9, scales=("matched", "raw"))
        matched, raw = (values(cells[CellKey("s", policy, "kept")]) for policy in POLICIES)
        assert (matched == raw) is is_same


def test_batch_size_does_not_change_numbers(tmp_path: Path) -> None:
    save_inference(random_training_sae("topk"), tmp_path / "sae")
    sae, directory = SAE.load_from_disk(tmp_path / "sae"), make_checkpoint(tmp_path / "m")
    threshold = 0.9 * norm_quantile(directory, 0.8)
    one, three = (
        values(
            evaluate(directory, tmp_path, [stored(sae)], threshold=threshold, batch_size=b)[
                CellKey("s", "matched", "excluded")
            ]
        )
        for b in (1, 3)
    )
    assert one == pytest.approx(three, abs=2e-6)


@pytest.mark.parametrize("hook", ["resid_pre", "attn_out"])
def test_how_much_runs_at_once_does_not_change_numbers(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path / "m")
    saes = []
    for architecture in ("standard", "topk", "jumprelu"):
        path = save_inference(random_training_sae(architecture), tmp_path / architecture)
        saes.append(stored(SAE.load_from_disk(path), 0.5, architecture))
    threshold = 0.9 * norm_quantile(directory, 0.8)

    def run(tokens: int, features: int, min_positions: int) -> dict[CellKey, CellSums]:
        monkeypatch.setattr("sae_transfer.models.passes.AT_ONCE", {"cpu": AtOnce(tokens, features)})
        monkeypatch.setattr("sae_transfer.models.passes.MIN_POSITIONS", min_positions)
        site = f"blocks.1.hook_{hook}"
        return evaluate(directory, tmp_path, saes, hook=site, threshold=threshold, scales=POLICIES)

    # one sequence and one splice a pass, features of 7 positions; then all splices of a batch in one pass
    little, much = run(1, 7 * 96, 1), run(10**6, 10**6, 256)
    assert len(little) == 12
    for key, cell in little.items():
        assert np.array_equal(cell.alive, much[key].alive)
        for name, sums in cell.sums.items():
            np.testing.assert_allclose(sums, much[key].sums[name], rtol=1e-5, atol=3e-5, err_msg=f"{key} {name}")


def test_a_live_feature_is_one_active_on_a_counted_position(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    sae = SAE.load_from_disk(save_inference(random_training_sae("topk"), tmp_path / "sae"))
    threshold = 0.9 * norm_quantile(directory, 0.2)
    found = evaluate(directory, tmp_path, [stored(sae)], threshold=threshold, group_size=4)
    x = torch.from_numpy(np.lib.format.open_memmap(tmp_path / "acts.npy").copy())
    active = (sae.encode(x) > 0).numpy()
    inside = (0.9 * x.norm(dim=-1) <= threshold).numpy()
    for policy, mask in (("excluded", inside), ("kept", np.ones_like(inside))):
        counted = active & mask[..., None]
        expected = np.stack([counted[start : start + 4].any((0, 1)) for start in range(0, N_SEQ, 4)])
        assert 0 < expected.mean() < 1
        cell = found[CellKey("s", "matched", policy)]
        assert np.array_equal(cell.alive, expected) and np.array_equal(cell.sums["l0"], counted.sum((1, 2)))


def test_batch_averaging_takes_the_mean_of_each_batch(tmp_path: Path) -> None:
    save_inference(random_training_sae("standard"), tmp_path / "sae")
    sae, directory = SAE.load_from_disk(tmp_path / "sae"), make_checkpoint(tmp_path / "m")
    cell = evaluate(directory, tmp_path, [stored(sae)], group_size=4)[CellKey("s", "matched", "kept")]
    ours = values(cell, "batch", 4)
    x = 0.9 * np.lib.format.open_memmap(tmp_path / "acts.npy").astype(np.float64)
    by_hand = []
    for start in range(0, N_SEQ, 4):
        batch = torch.from_numpy(x[start : start + 4].reshape(-1, 32))
        recon = 0.9 * sae((batch / 0.9).float()).double()
        error, spread = (batch - recon).square().sum(-1), (batch - batch.mean(0)).square().sum(-1)
        by_hand.append((1 - error.sum() / spread.sum()).item())
    assert ours["explained_variance"] == pytest.approx(np.mean(by_hand), abs=1e-6)
