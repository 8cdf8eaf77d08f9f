"""Studies end to end on a random pair: what is written, what is done again, what is refused."""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from sae_transfer import __version__
from sae_transfer.analysis.metrics import METRICS
from sae_transfer.errors import StudyError
from sae_transfer.models.tokens import load_token_set
from sae_transfer.pipeline import run_stages
from sae_transfer.report.page import write_report
from sae_transfer.stages import context
from sae_transfer.study_file import load_study, parse_study_file
from tests.checkpoints import make_checkpoint
from tests.saes.saes import identity_sae, random_training_sae, save_inference
from tests.studies import hold, read_rows, write_study

ALL = ("tokens", "train", "cross-eval", "report")
COLUMNS = (
    "section,sae,sae_trained_on,architecture,d_sae,sparsity_key,sparsity_value,seed,model,hook_name,dtype,scale,"
    "norm_scale,sae_scale,outliers,outlier_threshold,averaging,n_tokens,n_loss_tokens,n_outliers,n_sequences,l0,"
    "frac_alive,ce_recovered,ce_clean,ce_sae,ce_delta,ce_zero,ce_mean,kl,top1_agreement,explained_variance_per_token,"
    "explained_variance,mse"
).split(",")


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory, llama_pair: tuple[Path, Path], text_file: Path) -> Path:
    saes = [
        {"widths": [64], "l1_coefficient": [1], "seeds": [0, 1]},
        {"architecture": "topk", "widths": [48], "k": [8]},
    ]
    evaluate = {"tokens": 1024, "outlier_threshold": 6.5, "scale": ["matched", "raw"]}
    return write_study(tmp_path_factory.mktemp("study"), *llama_pair, text_file, saes=saes, evaluate=evaluate)


@pytest.fixture(scope="module")
def finished(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "small"
    run_stages(load_study(study_file), run, ALL)
    return run


def test_a_run_writes_what_the_design_lists(finished: Path) -> None:
    for name in (
        "study.yaml",
        "manifest.json",
        "log.txt",
        "tokens/tokens.json",
        "scales.json",
        "cross_eval/rows.csv",
        "cross_eval/transfer.csv",
        "cross_eval/sums.npz",
        "report/tables/cross_eval.csv",
        "report/tables/cross_eval.md",
        "report/tables/cross_eval.tex",
    ):
        assert (finished / name).stat().st_size > 0, name
    names = [
        f"{side}-{sae}"
        for side in ("base", "chat")
        for sae in ("standard-w64-l1_1-s0", "standard-w64-l1_1-s1", "topk-w48-k8-s0")
    ]
    assert sorted(path.name for path in (finished / "saes").iterdir()) == sorted(names)
    for name in names:
        files = {path.name for path in (finished / "saes" / name).iterdir()}
        assert files == {"sae_weights.safetensors", "cfg.json", "provenance.json", "train_log.jsonl"}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"packages", "git", "hardware", "models", "token_set", "seeds", "command", "study_hash"} <= set(manifest)
    for side in ("base", "chat"):
        for purpose in ("training", "evaluation"):
            agreement = manifest["site_agreement"][f"{side}-{purpose}"]
            assert (agreement["path"], agreement["dtype"]) == ("restart", "float32")
            assert 0 <= agreement["difference"] < 1e-5
    rates = manifest["throughput"]
    assert rates["tokens"]["tokens"] > 0
    for side in ("base", "chat"):
        assert set(rates[f"train-{side}"]) >= {"language_model", "sae_step"}
        assert all(rate > 0 for rate in rates[f"train-{side}"].values())
    *_, tokens, base, chat = (finished / "log.txt").read_text().splitlines()
    for line, stage in ((tokens, "tokens"), (base, "train-base"), (chat, "train-chat")):
        assert f"speed of {stage}: " in line and "tokens/s" in line
    assert not list(finished.rglob(".activations*"))


def test_rows_have_the_columns_of_the_design_and_every_cell(finished: Path) -> None:
    rows = read_rows(finished)
    ends = [f"{metric}_{end}" for metric in METRICS for end in ("low", "high")]
    assert list(rows[0]) == [*COLUMNS, *ends]
    cells = {(r["sae"], r["model"], r["scale"], r["outliers"]) for r in rows}
    assert len(rows) == len(cells) == 6 * 2 * 2 * 2
    assert {r["section"] for r in rows} == {"pile"}
    for row in rows:
        assert float(row["ce_delta_low"]) <= float(row["ce_delta"]) <= float(row["ce_delta_high"])
        n_counted = int(row["n_tokens"]) + (int(row["n_outliers"]) if row["outliers"] == "excluded" else 0)
        assert n_counted == 1024 and int(row["n_loss_tokens"]) == 32 * 31
    assert any(int(row["n_outliers"]) > 0 for row in rows)


def test_transfer_pairs_each_transferred_sae_with_its_native_twin(finished: Path) -> None:
    rows = {(r["sae"], r["model"], r["scale"], r["outliers"]): r for r in read_rows(finished)}
    gaps = read_rows(finished, "cross_eval/transfer.csv")
    assert len(gaps) == 3 * 2 * 2 * 2
    for gap in gaps:
        place = (gap["model"], gap["scale"], gap["outliers"])
        ours, native = rows[gap["transferred"], *place], rows[gap["native"], *place]
        assert gap["transferred"].split("-", 1)[1] == gap["native"].split("-", 1)[1]
        assert native["sae_trained_on"] == gap["model"] != ours["sae_trained_on"]
        difference = float(ours["ce_delta"]) - float(native["ce_delta"])
        assert float(gap["ce_delta_gap"]) == pytest.approx(difference, abs=1e-12)
        assert float(gap["ce_delta_low"]) <= difference <= float(gap["ce_delta_high"])


def test_a_trained_sae_loaded_by_saelens_gives_on_raw_activations_what_the_study_measured(
    finished: Path, llama_pair: tuple[Path, Path]
) -> None:
    scales = json.loads((finished / "scales.json").read_text())
    tokens = torch.from_numpy(load_token_set(finished / "tokens").evaluation.astype(np.int64))
    sae = SAE.load_from_disk(finished / "saes" / "base-standard-w64-l1_1-s0")
    model = AutoModelForCausalLM.from_pretrained(llama_pair[0])
    with torch.no_grad():
        x = model(tokens, output_hidden_states=True).hidden_states[1].flatten(0, 1)
        mse = (scales["base"] * (sae(x) - x)).square().sum(-1).mean().item()
        l0 = (sae.encode(x) > 0).sum(-1).float().mean().item()
    row = next(
        r
        for r in read_rows(finished)
        if (r["sae"], r["model"], r["scale"], r["outliers"]) == ("base-standard-w64-l1_1-s0", "base", "matched", "kept")
    )
    assert float(row["mse"]) == pytest.approx(mse, rel=2e-5)
    assert float(row["l0"]) == pytest.approx(l0, abs=2 / 1024)


def test_the_norm_scale_is_that_of_the_first_training_tokens(finished: Path, llama_pair: tuple[Path, Path]) -> None:
    training = load_token_set(finished / "tokens").training[:64].astype(np.int64)  # 2048 tokens
    model = AutoModelForCausalLM.from_pretrained(llama_pair[1])
    with torch.no_grad():
        norms = model(torch.from_numpy(training), output_hidden_states=True).hidden_states[1].norm(dim=-1)
    expected = 32**0.5 / norms.double().mean().item()
    assert json.loads((finished / "scales.json").read_text())["chat"] == pytest.approx(expected, rel=1e-6)


def test_running_again_does_nothing_and_says_so(
    finished: Path, study_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.npz")}
    caplog.set_level("INFO")
    run_stages(load_study(study_file), finished, ALL)
    for stage in ("tokens", "train-base", "train-chat", "cross-eval"):
        assert f"{stage}: done already, nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.npz")} == stamps


def test_a_study_is_exact_where_the_environment_switches_tf32_on(finished: Path, study_file: Path) -> None:
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    try:
        run_stages(load_study(study_file), finished, ALL)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_same_study_twice_gives_identical_rows_also_from_its_resolved_file(finished: Path, tmp_path: Path) -> None:
    run_stages(parse_study_file(finished / "study.yaml"), tmp_path / "again", ALL)
    for name in ("cross_eval/rows.csv", "cross_eval/transfer.csv"):
        assert (tmp_path / "again" / name).read_text() == (finished / name).read_text()


def test_a_stage_whose_inputs_changed_names_them_and_asks(finished: Path, study_file: Path) -> None:
    before = (finished / "cross_eval" / "rows.csv").read_text()
    changed = load_study(study_file, ["evaluate.outlier_threshold=7"])
    with pytest.raises(StudyError, match=r"cross-eval: .* changed since: evaluate"):
        run_stages(changed, finished, ("cross-eval",))
    assert (finished / "cross_eval" / "rows.csv").read_text() == before
    with pytest.raises(StudyError, match=r"train-base: .* changed since: train"):
        run_stages(load_study(study_file, ["train.lr=0.1"]), finished, ("train",))


def test_force_does_a_changed_stage_again(study_file: Path, tmp_path: Path) -> None:
    small = ["saes=[{widths: [32]}]", "evaluate.tokens=128", "train.tokens=256"]
    run = tmp_path / "run"
    run_stages(load_study(study_file, small), run, ALL)
    run_stages(load_study(study_file, [*small, "evaluate.outlier_threshold=7"]), run, ("cross-eval",), force=True)
    assert {row["outlier_threshold"] for row in read_rows(run)} == {"7.0"}


def test_cross_eval_before_training_says_which_verb_trains(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="sae-transfer train CONFIG"):
        run_stages(load_study(study_file), tmp_path / "run", ("cross-eval",))


def test_a_directory_of_another_study_is_refused_and_left_alone(
    finished: Path, study_file: Path, tmp_path: Path, llama_pair: tuple[Path, Path]
) -> None:
    content = (finished / "study.yaml").read_text()
    other = make_checkpoint(tmp_path / "other", seed=9)
    for override, reason in ((f"pair.base={other}", "base model"), ("site.layer=2", "site")):
        with pytest.raises(StudyError, match=f"belongs to another study.* {reason}"):
            run_stages(load_study(study_file, [override]), finished, ALL)
    assert (finished / "study.yaml").read_text() == content
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(StudyError, match="is not empty, and not a run directory"):
        run_stages(load_study(study_file), tmp_path / "home", ALL)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_run_directory_can_be_moved_with_its_models(
    finished: Path, study_file: Path, tmp_path: Path, llama_pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:

    for path in (*llama_pair, finished):
        shutil.copytree(path, tmp_path / path.name)
    caplog.set_level("INFO")
    moved = load_study(study_file, [f"pair.base={tmp_path / 'base'}", f"pair.chat={tmp_path / 'chat'}"])
    run_stages(moved, tmp_path / "small", ALL)
    assert "cross-eval: done already" in caplog.text


def test_saes_from_elsewhere_alone_need_no_training_tokens(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    save_inference(random_training_sae("standard"), tmp_path / "mine")
    save_inference(identity_sae(), tmp_path / "identity")
    external = [
        {"name": "mine", "trained_on": "chat", "path": "mine", "scale": 0.402},
        {"name": "identity", "trained_on": "base", "path": "identity"},
    ]
    sections = {"saes": None, "train": None, "external_saes": external, "norm_scale": {"base": 1.1, "chat": 0.7}}
    study = load_study(write_study(tmp_path, *llama_pair, text_file, **sections))
    run = tmp_path / "run"
    run_stages(study, run, ("cross-eval", "report"))
    rows = read_rows(run)
    assert load_token_set(run / "tokens").training.shape[0] == 0
    scales = {(r["sae"], r["model"]): (float(r["norm_scale"]), float(r["sae_scale"])) for r in rows}
    assert scales == {
        ("mine", "base"): (1.1, 0.402),
        ("mine", "chat"): (0.7, 0.402),
        ("identity", "base"): (1.1, 1.1),
        ("identity", "chat"): (0.7, 1.1),
    }
    identity = [row for row in rows if row["sae"] == "identity"]
    assert all(float(row["explained_variance"]) == pytest.approx(1, abs=1e-9) for row in identity)


def test_without_training_or_given_factors_scales_come_from_the_evaluation_tokens(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    save_inference(identity_sae(), tmp_path / "identity")
    external = [{"name": "identity", "trained_on": "base", "path": "identity"}]
    study = load_study(write_study(tmp_path, *llama_pair, text_file, saes=None, train=None, external_saes=external))
    run_stages(study, tmp_path / "run", ("cross-eval",))
    scales = json.loads((tmp_path / "run" / "scales.json").read_text())
    assert scales["measured_on"] == "the evaluation tokens"
    assert {float(row["norm_scale"]) for row in read_rows(tmp_path / "run")} == {scales["base"], scales["chat"]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"site": {"layer": 3, "hook": "resid_pre"}}, r"site\.layer: 3 is beyond the model, whose layers are 0 to 2"),
        ({"compute": {"device": "cuda"}}, r"compute\.device: cuda is asked for, and this machine has no such device"),
        ({"evaluate": {"tokens": 10_000_000}}, r"tokens"),
    ],
)
def test_studies_that_cannot_run_are_refused_before_anything_is_trained(
    sections: dict, message: str, llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    if "compute" in sections and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    study = load_study(write_study(tmp_path, *llama_pair, text_file, **sections))
    with pytest.raises(StudyError, match=message):
        run_stages(study, tmp_path / "run", ALL)
    assert not (tmp_path / "run" / "saes").exists()


def test_an_sae_of_the_wrong_width_is_refused(llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    save_inference(identity_sae(16), tmp_path / "narrow")
    external = [{"name": "narrow", "trained_on": "base", "path": "narrow"}]
    study = load_study(write_study(tmp_path, *llama_pair, text_file, saes=None, train=None, external_saes=external))
    with pytest.raises(StudyError, match="d_in is 16"):
        run_stages(study, tmp_path / "run", ("cross-eval",))
    assert not (tmp_path / "run" / "cross_eval" / "rows.csv").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore")])
def test_a_lack_of_memory_anywhere_is_said_with_what_to_do(
    error: Exception, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(context, "load_model", fail)
    with pytest.raises(
        StudyError, match=r"out of memory \(.*\); finished stages are kept.*\n  try: a device with more"
    ):
        run_stages(load_study(study_file), tmp_path / "run", ("train",))
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "try: a device with more" in said and "Traceback" not in said


def test_no_secret_reaches_a_file(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_secretsecretsecret",
        "WANDB_API_KEY": "0123456789abcdef0123",
        "MY_PASSWORD": "hushhushhush",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["sae-transfer", "run", f"--set=name={secrets['HF_TOKEN']}"])
    logging.getLogger("sae_transfer").setLevel(logging.INFO)
    run_stages(load_study(study_file), tmp_path / "run", ALL)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (tmp_path / "run" / "report" / "index.html") in written
    for path in written:
        content = path.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], path


def test_a_directory_in_use_is_refused_until_its_process_is_gone(finished: Path, study_file: Path) -> None:
    holder = hold(finished, "base", "chat")
    with pytest.raises(StudyError, match="another sae-transfer process"):
        run_stages(load_study(study_file), finished, ALL)
    holder.kill()
    holder.wait()
    run_stages(load_study(study_file), finished, ALL)


def test_a_run_directory_of_a_newer_version_is_refused_with_both_named(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["packages"]["sae-transfer"] = "99.1"
    (run / "manifest.json").write_text(json.dumps(manifest))
    both = rf"sae-transfer 99\.1, and this is {re.escape(__version__)}"
    with pytest.raises(StudyError, match=both):
        run_stages(parse_study_file(run / "study.yaml"), run, ("cross-eval",))
    with pytest.raises(StudyError, match=both):
        write_report(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_write_permission_is_refused(study_file: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StudyError, match="cannot be written"):
        run_stages(load_study(study_file), tmp_path / "run", ALL)


def test_a_refused_run_leaves_the_study_file_of_the_finished_one(finished: Path, study_file: Path) -> None:
    before = {name: (finished / name).read_text() for name in ("study.yaml", "manifest.json")}
    with pytest.raises(StudyError, match="changed since: tokens"):
        run_stages(load_study(study_file, ["tokens.seed=3"]), finished, ALL)
    assert {name: (finished / name).read_text() for name in before} == before


def test_a_mended_checkpoint_is_taken_where_only_tokens_were_made(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    chat = shutil.copytree(llama_pair[1], tmp_path / "chat")
    weights = (chat / "model.safetensors").read_bytes()
    (chat / "model.safetensors").write_bytes(weights[:-500])
    study = load_study(write_study(tmp_path, llama_pair[0], chat, text_file), ["train.tokens=256"])
    with pytest.raises(StudyError, match="fetch or copy the checkpoint again"):
        run_stages(study, tmp_path / "run", ("train",))
    (chat / "model.safetensors").write_bytes(weights)
    run_stages(study, tmp_path / "run", ("train",))


def test_changed_content_of_a_dataset_or_an_external_sae_is_noticed(
    llama_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (16, 32)).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    save_inference(random_training_sae("standard"), tmp_path / "mine")
    external = [{"name": "mine", "trained_on": "base", "path": "mine"}]
    sections = {"saes": None, "train": None, "external_saes": external, "tokens": {"dataset": "ids.npy"}}
    evaluate = {"tokens": 512, "outliers": ["kept"]}
    study = load_study(write_study(tmp_path, *llama_pair, tmp_path, **sections, evaluate=evaluate))
    run_stages(study, tmp_path / "run", ("cross-eval",))
    assert {row["n_tokens"] for row in read_rows(tmp_path / "run")} == {"512"}
    config = tmp_path / "mine" / "cfg.json"
    config.write_text(config.read_text().replace('"apply_b_dec_to_input": false', '"apply_b_dec_to_input": true'))
    with pytest.raises(StudyError, match="changed since: external SAEs"):
        run_stages(study, tmp_path / "run", ("cross-eval",))
    np.save(tmp_path / "ids.npy", ids[::-1])
    with pytest.raises(StudyError, match="changed since: content of the dataset"):
        run_stages(study, tmp_path / "run", ("cross-eval",))


def test_lost_weights_are_trained_again(llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, *llama_pair, text_file), ["train.tokens=256"])
    run = tmp_path / "run"
    run_stages(study, run, ("train",))
    lost = run / "saes" / "base-standard-w64-l1_1-s0" / "sae_weights.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(StudyError, match="its weights are gone"):
        run_stages(study, run, ("cross-eval",))
    run_stages(study, run, ("train",))
    assert lost.read_bytes() == content


def test_saes_and_thresholds_without_meaning_are_refused(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    sae = identity_sae()
    sae.b_dec[3] = float("nan")
    save_inference(sae, tmp_path / "nan")
    save_inference(identity_sae(), tmp_path / "good")
    for name, threshold, message in (("nan", 8, "not finite"), ("good", 0.001, "every position is an outlier")):
        external = [{"name": name, "trained_on": "base", "path": name}]
        sections = {"saes": None, "train": None, "external_saes": external}
        study = load_study(write_study(tmp_path, *llama_pair, text_file, **sections))
        study = load_study(tmp_path / "small.yaml", [f"evaluate.outlier_threshold={threshold}"])
        with pytest.raises(StudyError, match=message):
            run_stages(study, tmp_path / name / "run", ("cross-eval",))


def test_an_sae_of_another_model_is_refused_unless_the_study_says_so(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    sae = identity_sae()
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    save_inference(sae, tmp_path / "other")
    external = [{"name": "other", "trained_on": "base", "path": "other"}]
    config = write_study(tmp_path, *llama_pair, text_file, saes=None, train=None, external_saes=external)
    with pytest.raises(StudyError, match=r"was trained at blocks\.2"):
        run_stages(load_study(config), tmp_path / "run", ("cross-eval",))
    run_stages(load_study(config, ["external_saes.accept_mismatch=true"]), tmp_path / "run", ("cross-eval",))


def test_a_foreign_manifest_is_not_taken_for_ours(study_file: Path, tmp_path: Path) -> None:
    for content in ("{}", "garbage", "[1]"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(StudyError, match="not a run directory"):
            run_stages(load_study(study_file), tmp_path, ALL)
        assert (tmp_path / "manifest.json").read_text() == content


def test_given_ids_need_no_tokenizer(llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    bare = []
    for path in llama_pair:
        bare.append(shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("*token*", "*.jinja")))
        assert sorted(p.name for p in bare[-1].iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 250, (16, 24)))
    save_inference(identity_sae(), tmp_path / "mine")
    external = [{"name": "mine", "trained_on": "base", "path": "mine"}]
    sections = {"saes": None, "train": None, "external_saes": external, "tokens": {"dataset": "ids.npy"}}
    config = write_study(
        tmp_path, bare[0], bare[1], text_file, **sections, evaluate={"tokens": 384, "outliers": ["kept"]}
    )
    run_stages(load_study(config), tmp_path / "run", ("cross-eval",))
    assert {row["n_tokens"] for row in read_rows(tmp_path / "run")} == {"384"}
    for site in ("attn_out", "resid_mid"):
        run_stages(load_study(config, [f"site.hook={site}"]), tmp_path / site, ("cross-eval",))
    with pytest.raises(StudyError, match="the base model has no tokenizer"):
        run_stages(
            load_study(config, [f"tokens={{dataset: {text_file}, context_size: 24}}"]), tmp_path / "text", ("tokens",)
        )


def test_external_saes_of_the_same_settings_are_not_paired_at_random(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, scale in (("small", 1.0), ("big", 0.9)):
        save_inference(identity_sae(decoder_scale=scale), tmp_path / name)
    one = [{"name": f"{side}-small", "trained_on": side, "path": "small"} for side in ("base", "chat")]
    two = [*one, *({"name": f"{side}-big", "trained_on": side, "path": "big"} for side in ("base", "chat"))]
    for name, external, n_gaps in (("one", one, 4), ("two", two, 0)):
        sections = {"saes": None, "train": None, "external_saes": external}
        run_stages(
            load_study(write_study(tmp_path, *llama_pair, text_file, **sections)), tmp_path / name, ("cross-eval",)
        )
        assert len(read_rows(tmp_path / name, "cross_eval/transfer.csv")) == n_gaps
    assert "no gaps" in caplog.text
