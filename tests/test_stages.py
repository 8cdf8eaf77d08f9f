"""The stages beyond the main table, on a random pair: what they write, and that their numbers are right."""

import contextlib
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_transfer import pipeline, signals
from sae_transfer.errors import StudyError
from sae_transfer.models import conversations
from sae_transfer.models.chat import read_rollouts, section_positions
from sae_transfer.models.tokens import load_token_set
from sae_transfer.pipeline import STAGES, run_stages
from sae_transfer.saes import trainer
from sae_transfer.saes.training import continued_sae
from sae_transfer.stages.context import Context, dataset_digests
from sae_transfer.study_file import load_study
from tests.asking import Dying
from tests.checkpoints import words_of
from tests.saes.saes import ARCHITECTURES, SPARSITY, random_training_sae
from tests.studies import read_rows, write_study

INSTRUCTIONS = [{"instruction": f"the cat sat on {n} red ships", "input": "", "output": "so"} for n in range(40)]


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory, llama_pair: tuple[Path, Path], text_file: Path) -> Path:
    directory = tmp_path_factory.mktemp("study")
    (directory / "instructions.json").write_text(json.dumps(INSTRUCTIONS))
    saes = [{"architecture": name, "widths": [48], SPARSITY[name][0]: [SPARSITY[name][1]]} for name in ARCHITECTURES]
    return write_study(
        directory,
        *llama_pair,
        text_file,
        saes=saes,
        finetune={"tokens": [512, 1024], "control": True, "batch_size": 64},
        instruct={"dataset": str(directory / "instructions.json"), "n": 12, "max_new_tokens": 10, "batch_size": 5},
        evaluate={"tokens": 1024, "outlier_threshold": 6.5},
    )


@pytest.fixture(scope="module")
def others_in_memory() -> list[int]:
    """How many other models were in memory, whenever one was loaded for `finished`."""
    return []


@pytest.fixture(scope="module")
def finished(study_file: Path, tmp_path_factory: pytest.TempPathFactory, others_in_memory: list[int]) -> Path:
    run = tmp_path_factory.mktemp("runs") / "small"
    embeddings: list[weakref.ref[torch.nn.Module]] = []
    load: Any = AutoModelForCausalLM.from_pretrained

    def counted(*arguments: Any, **options: Any) -> Any:
        others_in_memory.append(sum(embedding() is not None for embedding in embeddings))
        loaded = load(*arguments, **options)
        embeddings.append(weakref.ref(loaded[0].get_input_embeddings()))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
        run_stages(load_study(study_file), run, STAGES[:-1])  # no test here reads the report
    return run


@pytest.fixture(scope="module")
def tiny_study_file(tmp_path_factory: pytest.TempPathFactory, llama_pair: tuple[Path, Path], text_file: Path) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "instructions.json").write_text(json.dumps(INSTRUCTIONS))
    return write_study(
        directory,
        *llama_pair,
        text_file,
        saes=[
            {"widths": [48], "l1_coefficient": [1]},
            {"architecture": "topk", "widths": [48], "k": [4]},
        ],
        train={"tokens": 1024, "batch_size": 64, "lr": 1e-3, "scale_tokens": 512},
        finetune={"tokens": [512], "batch_size": 64},
        instruct={"dataset": str(directory / "instructions.json"), "n": 3, "max_new_tokens": 4},
        evaluate={"tokens": 512, "outlier_threshold": 6.5},
    )


@pytest.fixture(scope="module")
def tiny_on_cpu(tiny_study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run_stages(load_study(tiny_study_file), run, STAGES[:-1])
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rel", "abs_"), [("float32", 1e-3, 1e-5), ("auto", 0.05, 0.05)])
def test_a_study_on_a_gpu_has_the_numbers_of_the_cpu(
    dtype: str,
    rel: float,
    abs_: float,
    gpu: str,
    tiny_study_file: Path,
    tiny_on_cpu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == "float32":  # in all products: TF32 keeps three digits, too few to compare
        monkeypatch.setattr(trainer, "_tensor_cores", SimpleNamespace(on=lambda _: contextlib.nullcontext()))
    changes = [f"compute.device={gpu}", f"pair.dtype={dtype}", f"compute.autocast={dtype}"]
    run_stages(load_study(tiny_study_file, changes), tmp_path / "run", STAGES[:-1])
    tables = ["cross_eval/rows.csv"]
    if dtype == "float32":
        tables += ["instruct/rows.csv", "outliers/thresholds.csv", "weights/rows.csv"]
    for table in tables:
        ours, expected = read_rows(tmp_path / "run", table), read_rows(tiny_on_cpu, table)
        for row, other in zip(ours, expected, strict=True):
            for key, value in other.items():
                if dtype == "auto" and key.endswith(("recovered", "_low", "_high")):
                    continue  # ablating a random model makes a small difference only, and its sequences differ much
                # a feature at the edge of being active, a token between two others
                least = 0.06 if key.startswith(("l0", "frac_alive", "top1_agreement")) else abs_
                assert row[key] == value or float(row[key]) == pytest.approx(float(value), rel=rel, abs=least), key
    rollouts = [(run / "instruct" / "rollouts.jsonl").read_text() for run in (tmp_path / "run", tiny_on_cpu)]
    assert rollouts[0] == rollouts[1]


def chat_acts(finished: Path, chat: Path) -> torch.Tensor:
    """Scaled activations of the chat model over the evaluation tokens, by Hugging Face alone."""
    scale = json.loads((finished / "scales.json").read_text())["chat"]
    tokens = torch.from_numpy(load_token_set(finished / "tokens").evaluation.astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(chat)
    with torch.no_grad():
        return scale * model(tokens, output_hidden_states=True).hidden_states[1].flatten(0, 1)


@pytest.mark.usefixtures("finished")
def test_no_model_is_loaded_beside_another(others_in_memory: list[int]) -> None:
    # both for scales, training and weights, the base model twice for cross-evaluation and outliers; the chat model for
    # each budget, its answers and their evaluation
    assert others_in_memory == [0] * (3 * 2 + 2 * 3 + 2 + 2)


@pytest.mark.parametrize(
    ("stage", "record", "made"),  # the stage's first record, and what would leave it nothing to do
    [
        ("tokens", "tokens", "tokens"),
        ("train", "scales", ""),
        ("train", "train-base", "saes/base-*"),
        ("finetune", "finetune", "saes/finetuned-*"),
        ("cross-eval", "cross-eval", ""),
        ("outliers", "outliers", ""),
        ("instruct", "rollouts", ""),
        ("weights", "weights", ""),
    ],
)
def test_no_stage_is_finished_after_a_signal_whose_exception_was_lost(
    stage: str,
    record: str,
    made: str,
    study_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "stages" / f"{record}.json").unlink()
    for directory in run.glob(made) if made else ():
        shutil.rmtree(directory)
    work = pipeline._WORK[stage]

    def work_after_a_lost_signal(context: Context) -> None:
        Dying()  # in the stage: before it, the pipeline looks itself
        work(context)

    monkeypatch.setitem(pipeline._WORK, stage, work_after_a_lost_signal)
    with signals.installed(), pytest.raises(signals.Stopped):
        run_stages(load_study(study_file), run, (stage,), force=True)
    assert not (run / "stages" / f"{record}.json").exists()


def test_no_stage_begins_after_one_that_lost_a_signal(
    study_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_transfer.report.page.write_report", lambda run: Dying())
    with signals.installed(), pytest.raises(signals.Stopped):
        run_stages(load_study(study_file), finished, ("report", "never"))


def row_of(finished: Path, sae: str, model: str, outliers: str = "kept") -> dict[str, str]:
    (row,) = [r for r in read_rows(finished) if (r["sae"], r["model"], r["outliers"]) == (sae, model, outliers)]
    return row


def own_name(architecture: str) -> str:
    short = {"l1_coefficient": "l1_", "k": "k", "l0_coefficient": "l0_"}[SPARSITY[architecture][0]]
    return f"{architecture}-w48-{short}{SPARSITY[architecture][1]:g}-s0"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fine_tuning_starts_where_cross_evaluation_puts_the_base_sae_on_the_chat_model(
    architecture: str, finished: Path, llama_pair: tuple[Path, Path]
) -> None:
    name = own_name(architecture)
    sae = continued_sae(finished / "saes" / f"base-{name}", random_training_sae(architecture, d_sae=48))
    x = chat_acts(finished, llama_pair[1])
    row = row_of(finished, f"base-{name}", "chat")
    with torch.no_grad():
        if architecture == "batchtopk":  # in training it keeps the k largest of a batch; its threshold is what is saved
            features = sae.encode(x) * (sae.encode(x) > float(sae.get_buffer("topk_threshold")))
            pre = (sae.process_sae_in(x) @ sae.W_enc + sae.get_parameter("b_enc")) * sae.W_dec.norm(dim=-1)
            features = pre.relu() * (pre > float(sae.get_buffer("topk_threshold")))
        else:
            features = sae.encode(x)
        error = (sae.decode(features) - x).square().sum(-1).mean().item()
        l0 = (features > 0).sum(-1).float().mean().item()
    assert error == pytest.approx(float(row["mse"]), rel=1e-4)
    assert l0 == pytest.approx(float(row["l0"]), abs=0.01)


def test_every_budget_has_a_fine_tuned_sae_and_a_control_with_a_full_schedule(finished: Path) -> None:
    for architecture in ARCHITECTURES:
        for budget in (512, 1024):
            for role in ("finetuned", "control"):
                directory = finished / "saes" / f"{role}-{own_name(architecture)}-{budget}"
                provenance = json.loads((directory / "provenance.json").read_text())
                assert provenance["tokens"] == budget and provenance["role"] == role
                assert provenance["trained_on"] == ("finetuned" if role == "finetuned" else "chat")
                lines = (directory / "train_log.jsonl").read_text().splitlines()
                assert json.loads(lines[-1])["lr"] < 0.3 * max(json.loads(line)["lr"] for line in lines)
    models = {row["model"] for row in read_rows(finished) if row["sae"].startswith("finetuned")}
    assert models == {"base", "chat"}


def test_fine_tuning_helps_on_the_chat_model(finished: Path) -> None:
    base, tuned = (
        row_of(finished, f"{kind}", "chat")
        for kind in ("base-" + own_name("standard"), f"finetuned-{own_name('standard')}-1024")
    )
    assert float(tuned["mse"]) < float(base["mse"])


def test_controls_are_native_to_no_gap(finished: Path) -> None:
    gaps = read_rows(finished, "cross_eval/transfer.csv")
    assert not any(
        gap["native"].startswith("control") or (gap["transferred"].startswith("control-") and gap["model"] == "chat")
        for gap in gaps
    )
    assert any(gap["transferred"].startswith("finetuned") and gap["native"].startswith("chat") for gap in gaps)


def test_outliers_are_counted_and_explained(finished: Path) -> None:
    rows = read_rows(finished, "outliers/rows.csv")
    for side in ("base", "chat"):
        of_side = [row for row in rows if row["model"] == side]
        n_outliers = {int(row["n_outliers"]) for row in of_side}
        assert n_outliers == {int(row_of(finished, "base-" + own_name("standard"), side)["n_outliers"])}
        assert sum(int(row["n_kind"]) for row in of_side) == n_outliers.pop()
        assert sum(int(row["n_kind"]) for row in of_side if row["kind"] == "bos_first") <= 32
    histogram = read_rows(finished, "outliers/histogram.csv")
    assert sum(int(row["count"]) for row in histogram if row["model"] == "base") == 1024
    assert json.loads((finished / "outliers" / "auto.json").read_text())["explanation"]


def test_the_threshold_sweep_agrees_with_cross_evaluation_at_the_studys_threshold(finished: Path) -> None:
    sweep = [row for row in read_rows(finished, "outliers/thresholds.csv") if float(row["threshold"]) == 6.5]
    assert len(sweep) == 4
    for row in sweep:
        expected = row_of(finished, row["sae"], row["model"], "excluded")
        for metric in ("l0", "mse", "ce_sae", "ce_recovered", "explained_variance", "kl"):
            assert float(row[metric]) == pytest.approx(float(expected[metric]), rel=1e-9)
    removed = {
        float(r["threshold"]): float(r["fraction_removed"])
        for r in read_rows(finished, "outliers/thresholds.csv")
        if r["model"] == "base"
    }
    fractions = [removed[threshold] for threshold in sorted(removed)]
    assert fractions == sorted(fractions, reverse=True) and fractions[-1] == 0


def test_the_errors_by_norm_are_those_that_cross_evaluation_averages(finished: Path) -> None:
    scatter = read_rows(finished, "outliers/scatter.csv")
    seen = {(row["sae"], row["model"]): [r for r in scatter if r["sae"] == row["sae"]] for row in scatter}
    assert {model for _, model in seen} == {"base", "chat"}
    for (sae, model), rows in seen.items():
        assert len({(row["sequence"], row["position"]) for row in rows}) == len(rows) == 1024, "no sample is needed yet"
        mean = np.mean([float(row["squared_error"]) for row in rows])
        assert mean == pytest.approx(float(row_of(finished, sae, model)["mse"]), rel=1e-6)


def test_instruction_sections_agree_with_a_row_by_row_computation(
    finished: Path, llama_pair: tuple[Path, Path]
) -> None:
    from sae_lens import SAE

    scales = json.loads((finished / "scales.json").read_text())
    rollouts = read_rollouts(finished / "instruct" / "rollouts.jsonl")
    assert len(rollouts) == 12
    name = "base-" + own_name("standard")
    sae = SAE.load_from_disk(finished / "saes" / name)
    model: Any = AutoModelForCausalLM.from_pretrained(llama_pair[1])
    rows = {
        (row["section"], row["outliers"]): row for row in read_rows(finished, "instruct/rows.csv") if row["sae"] == name
    }
    factor = scales["chat"] / scales["base"]
    for section in ("rollout", "user_prompt", "control"):
        clean, spliced, zeroed, errors, l0 = [], [], [], [], []
        for rollout in rollouts:  # batch size 1, no padding
            tokens = torch.tensor([rollout.token_ids])
            inside = torch.from_numpy(section_positions(rollout, section))
            seen: list[torch.Tensor] = []

            def logits(replace: Any, tokens: torch.Tensor = tokens, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                def hook(module: Any, args: Any, kwargs: Any) -> Any:
                    seen.append(args[0])
                    return ((replace(args[0]), *args[1:]), kwargs)

                handle = model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
                with torch.no_grad():
                    result = model(tokens).logits[0]
                handle.remove()
                return result

            def ce(z: torch.Tensor, inside: torch.Tensor = inside, tokens: torch.Tensor = tokens) -> torch.Tensor:
                return torch.nn.functional.cross_entropy(z[:-1], tokens[0, 1:], reduction="none")[inside[:-1]]

            with torch.no_grad():
                clean.append(ce(logits(lambda x: x)))
                features = sae.encode(seen[0] * factor)
                recon = sae.decode(features) / factor
                spliced.append(
                    ce(logits(lambda x, recon=recon, inside=inside: torch.where(inside[None, :, None], recon, x)))
                )
                zeroed.append(ce(logits(lambda x, inside=inside: torch.where(inside[None, :, None], 0.0, x))))
                errors.append(((seen[0] - recon) * scales["chat"]).square().sum(-1)[0][inside])
                l0.append((features > 0).sum(-1)[0][inside])
        row = rows[section, "kept"]
        means = [torch.cat(parts).double().mean().item() for parts in (clean, spliced, zeroed, errors)]
        assert float(row["ce_clean"]) == pytest.approx(means[0], abs=5e-6)
        assert float(row["ce_sae"]) == pytest.approx(means[1], abs=5e-6)
        assert float(row["ce_zero"]) == pytest.approx(means[2], abs=5e-6)
        assert float(row["mse"]) == pytest.approx(means[3], rel=2e-5)
        n = sum(len(part) for part in l0)
        assert int(row["n_tokens"]) == n
        assert float(row["l0"]) == pytest.approx(torch.cat(l0).double().mean().item(), abs=2 / n)


def test_instruction_numbers_do_not_depend_on_the_batch_size(study_file: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "instruct" / "rollouts.jsonl").read_text()
    run_stages(load_study(study_file, ["instruct.batch_size=1"]), tmp_path / "run", ("instruct",), force=True)
    assert (tmp_path / "run" / "instruct" / "rollouts.jsonl").read_text() == before
    for one, other in zip(
        read_rows(finished, "instruct/rows.csv"), read_rows(tmp_path / "run", "instruct/rows.csv"), strict=True
    ):
        for metric in ("l0", "mse", "ce_clean", "ce_sae", "ce_recovered", "explained_variance"):
            if one[metric]:
                assert float(one[metric]) == pytest.approx(float(other[metric]), abs=2e-6, rel=2e-6)


def test_weights_are_compared(finished: Path, llama_pair: tuple[Path, Path]) -> None:
    base, chat = (dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for path in llama_pair)
    rows = {row["name"]: row for row in read_rows(finished, "weights/rows.csv")}
    name = "layers.1.self_attn.q_proj.weight"
    expected = ((chat[f"model.{name}"] - base[f"model.{name}"]).norm() / base[f"model.{name}"].norm()).item()
    assert float(rows[name]["relative_difference"]) == pytest.approx(expected, rel=1e-5)
    assert json.loads((finished / "weights" / "activations.json").read_text())["kept"]["n_positions"] == 1024


def test_fine_tuning_on_rollouts_uses_instructions_that_are_not_evaluated(study_file: Path, tmp_path: Path) -> None:
    overrides = [
        "saes=[{widths: [32]}]",
        "finetune={tokens: [256], data: rollouts, batch_size: 32}",
        "train.tokens=512",
    ]
    run_stages(load_study(study_file, overrides), tmp_path / "run", ("train", "finetune"))
    directory = tmp_path / "run" / "saes" / "finetuned-standard-w32-l1_3-s0-256"
    assert json.loads((directory / "provenance.json").read_text())["data"] == "rollouts"
    assert sorted(path.name for path in (tmp_path / "run" / "finetune").iterdir()) == ["positions.npy", "sequences.npy"]
    too_many = [*overrides, "finetune.tokens=[20k]"]
    with pytest.raises(StudyError, match="20,000 tokens are asked for, and 28 instructions"):
        run_stages(load_study(study_file, too_many), tmp_path / "other", ("train", "finetune"))


def test_answers_to_fine_tune_on_that_are_made_are_kept_when_the_rest_is_cut(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "saes=[{widths: [32]}]",
        "finetune={tokens: [256], data: rollouts, batch_size: 32}",
        "instruct.batch_size=1",
        "train.tokens=512",
    ]
    study = load_study(study_file, overrides)
    monkeypatch.setattr(conversations, "BATCHES_AT_ONCE", 1)
    run_stages(study, tmp_path / "uncut", ("train", "finetune"))
    answer, n_answered = conversations.generate_rollouts, 0

    def cut(*arguments: Any, **options: Any) -> Any:
        nonlocal n_answered
        n_answered += 1
        if n_answered == 4:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    monkeypatch.setattr(conversations, "generate_rollouts", cut)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_stages(study, run, ("train", "finetune"))
    assert len(list(run.glob("finetune/parts-*/*.jsonl"))) == 3
    run_stages(study, run, ("finetune",))
    files = [path.relative_to(run) for path in (*run.glob("finetune/*"), *run.glob("saes/finetuned*/*"))]
    assert len(files) == 2 + 4
    assert all((run / file).read_bytes() == (tmp_path / "uncut" / file).read_bytes() for file in files)
    whole = n_answered
    n_answered = 4
    run_stages(study, tmp_path / "again", ("train", "finetune"))
    assert whole - 4 == n_answered - 4 - 3, "what was answered before the cut is not answered again"


def test_a_changed_instruction_file_changes_what_is_fine_tuned_on_it(study_file: Path, tmp_path: Path) -> None:
    instructions = tmp_path / "instructions.jsonl"
    lines = [json.dumps({"instruction": f"say {word}"}) for word in words_of(7, 40).split()[:40]]
    instructions.write_text("\n".join(lines))
    overrides = [
        "saes=[{widths: [32]}]",
        "finetune={tokens: [256], data: rollouts, batch_size: 32}",
        f"instruct.dataset={instructions}",
        "train.tokens=512",
    ]
    study, run = load_study(study_file, overrides), tmp_path / "run"
    run_stages(study, run, ("train", "finetune"))
    instructions.write_text("\n".join(reversed(lines)))
    with pytest.raises(StudyError, match="changed since: content of the instructions"):
        run_stages(study, run, ("finetune",))


def test_every_file_of_a_dataset_in_directories_counts(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "data.arrow").write_text(split)
    before = dataset_digests(str(tmp_path))
    (tmp_path / "train" / "data.arrow").write_text("other")
    after = dataset_digests(str(tmp_path))
    assert {name for name in after if after[name] != before[name]} == {"train/data.arrow"}


def test_stages_that_need_others_say_which_verb_makes_them(study_file: Path, tmp_path: Path) -> None:
    study = load_study(study_file)
    for stage, verb in (("finetune", "train"), ("cross-eval", "train"), ("instruct", "train")):
        with pytest.raises(StudyError, match=f"sae-transfer {verb} CONFIG"):
            run_stages(study, tmp_path / "run", (stage,))


def test_outliers_and_weights_need_no_saes(study_file: Path, tmp_path: Path) -> None:
    run_stages(
        load_study(study_file, ["saes=null", "finetune=null", "instruct=null"]),
        tmp_path / "run",
        ("outliers", "weights"),
    )
    assert not (tmp_path / "run" / "outliers" / "thresholds.csv").exists()
    assert (tmp_path / "run" / "outliers" / "histogram.csv").exists()
    assert (tmp_path / "run" / "weights" / "by_kind.csv").exists()


def test_all_stages_again_do_nothing(study_file: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run_stages(load_study(study_file), finished, STAGES[:-1])  # the report is made whenever it is asked for
    for stage in ("finetune", "cross-eval", "outliers", "rollouts", "instruct", "weights"):
        assert f"{stage}: done already, nothing to do" in caplog.text


def test_a_pair_without_a_gap_runs_through_when_every_position_is_kept(study_file: Path, tmp_path: Path) -> None:
    small = ["saes=[{widths: [32]}]", "finetune=null", "instruct=null", "train.tokens=512"]
    auto = [*small, "evaluate.outlier_threshold=auto"]
    with pytest.raises(StudyError, match="auto found no gap"):
        run_stages(load_study(study_file, auto), tmp_path / "excluded", ("outliers",))
    run_stages(load_study(study_file, [*auto, "evaluate.outliers=[kept]"]), tmp_path / "kept")
    assert {row["n_outliers"] for row in read_rows(tmp_path / "kept", "outliers/rows.csv")} == {"0"}
    assert json.loads((tmp_path / "kept" / "outliers" / "auto.json").read_text())["threshold"] is None
    assert (tmp_path / "kept" / "report" / "index.html").exists()


def test_outliers_are_described_while_only_the_base_saes_are_trained(study_file: Path, tmp_path: Path) -> None:
    one_side = [
        "saes=[{widths: [32]}]",
        "finetune=null",
        "instruct=null",
        "train={models: [base], tokens: 512, batch_size: 64}",
    ]
    run_stages(load_study(study_file, one_side), tmp_path / "run", ("train",))
    both = [*one_side[:3], "train={models: [base, chat], tokens: 512, batch_size: 64}"]
    run_stages(load_study(study_file, both), tmp_path / "run", ("outliers",))
    assert {row["sae"] for row in read_rows(tmp_path / "run", "outliers/thresholds.csv")} == {
        "base-standard-w32-l1_3-s0"
    }
