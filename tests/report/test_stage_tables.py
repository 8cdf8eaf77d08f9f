from pathlib import Path

import pytest

from sae_transfer.report.outlier_tables import breakdown, outlier_table, outlier_token_table, threshold_table
from sae_transfer.report.results import Results, read_cells
from sae_transfer.report.tables import budget_table, finetune_table, instruct_table
from sae_transfer.report.weight_tables import activation_table, weight_table
from tests.report.runs import make_run, post_rows, row, write_csv, write_json

STEM = "standard-w131072-l1_3-s0"


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"bos_first": 1.0}, "100% BOS at position 0"),
        (
            {"paragraph": 0.11, "bos_later": 0.63, "first_newline": 0.26},
            "63% BOS later, 26% first newline, 11% paragraph symbols",
        ),
        (
            {"bos_first": 0.4, "bos_later": 0.23, "early": 0.37},
            "63% BOS (40% at position 0, 23% later), 37% positions 1 to 9",
        ),
        ({"newline": 0.996, "other": 0.004, "early": 0.0}, "100% later newlines, <1% other"),
        ({"bos_first": float("nan")}, "none"),
    ],
)
def test_outliers_are_broken_down_in_the_posts_form(shares: dict[str, float], text: str) -> None:
    assert breakdown(shares) == text


def test_the_outlier_table_has_the_posts_columns(tmp_path: Path) -> None:
    of = {"norm_scale": 11.58, "threshold": 200.0, "threshold_source": "given", "n_tokens": 98304}
    base = {"model": "base", **of, "n_outliers": 184, "fraction": 184 / 98304}
    chat = {"model": "chat", **of, "n_outliers": 0, "fraction": 0.0}
    rows = [
        {**base, "kind": "bos_first", "n_kind": 46, "share": 0.25},
        {**base, "kind": "newline", "n_kind": 138, "share": 0.75},
        {**chat, "kind": "bos_first", "n_kind": 0, "share": ""},
    ]
    write_csv(tmp_path / "outliers/rows.csv", rows)
    outlier_table(Results(tmp_path)).write(tmp_path)
    assert (tmp_path / "outliers.md").read_text() == (
        "**Positions whose scaled norm exceeds the threshold, of 98,304, and what they are.**\n\n"
        "| Model | Outlier threshold | Frac outliers | Count | Breakdown |\n"
        "| --- | ---: | ---: | ---: | --- |\n"
        "| Base | 200 | 0.001872 | 184 | 75% later newlines, 25% BOS at position 0 |\n"
        "| Chat | 200 | 0.000000 | 0 | none |\n"
    )
    assert ",200.0,0.0018717447916666667,184," in (tmp_path / "outliers.csv").read_text()


def test_outlier_tokens_keep_their_escaped_text(tmp_path: Path) -> None:
    token = {
        "model": "chat",
        "kind": "newline",
        "token_id": 13,
        "token": r"'NA\n|'",
        "count": 1234,
        "mean_norm": 900.55,
        "max_norm": 2100,
    }
    write_csv(tmp_path / "outliers/tokens.csv", [token])
    outlier_token_table(Results(tmp_path)).write(tmp_path)
    assert (
        r"| Chat | later newlines | 'NA\n\|' | 13 | 1,234 | 900.5 | 2100.0 |"
        in (tmp_path / "outlier_tokens.md").read_text()
    )


def test_the_threshold_sweep_shows_percent_removed_and_empty_metrics_as_undefined(tmp_path: Path) -> None:
    of = {"threshold": 50, "sae": f"base-{STEM}", "sae_trained_on": "base", "model": "chat"}
    rows = [
        {**of, "fraction_removed": 0.00125, "l0": 95.2, "mse": 1014.2},
        {**of, "fraction_removed": 1, "l0": "", "mse": ""},
    ]
    write_csv(tmp_path / "outliers/thresholds.csv", rows)
    (block,) = threshold_table(Results(tmp_path), {f"base-{STEM}": "Base"}).printed
    assert block.table.to_numpy().tolist() == [
        ["Base", "Chat", "50", "0.125", "95.2", "1014"],
        ["Base", "Chat", "50", "100.000", "n/a", "n/a"],
    ]


def test_the_table_of_fine_tuning_is_the_posts_on_the_chat_model_with_outliers(tmp_path: Path) -> None:
    control = f"control-{STEM}-5M"
    for outliers in ("kept", "excluded"):
        rows = [
            *post_rows(outliers=outliers),
            row("finetuned", "chat", outliers=outliers),
            row("chat", "chat", sae=control, outliers=outliers),
        ]
        table = finetune_table(read_cells(make_run(tmp_path, rows), "cross_eval", "cross-eval"))
        cells = [block.table[["SAE", "Model", "L0"]].to_numpy().tolist() for block in table.printed]
        expected = [["Chat", "Chat", "101.7"], ["Base", "Chat", "126.1"], ["Fine-tuned base", "Chat", "86.0"]]
        assert cells == ([expected] if outliers == "kept" else [])


def test_there_is_no_table_of_fine_tuning_without_a_fine_tuned_sae(tmp_path: Path) -> None:
    cells = read_cells(make_run(tmp_path, post_rows(outliers="kept")), "cross_eval", "cross-eval")
    assert finetune_table(cells).printed == []
    assert budget_table(cells, {}).printed == []


def test_budgets_stand_in_their_order_between_the_untuned_base_and_the_full_chat_sae(tmp_path: Path) -> None:
    rows = [row("finetuned", "chat", sae=f"finetuned-{STEM}-{budget}") for budget in ("5M", "500k")]
    rows += [row("chat", "chat", sae=f"control-{STEM}-500k", l0=200.0)]
    # Of other settings: not of this curve.
    rows += [row("chat", "chat", sae="chat-standard-w64-l1_3-s0", d_sae=64), *post_rows()]
    cells = read_cells(make_run(tmp_path, rows), "cross_eval", "cross-eval")
    (block,) = budget_table(cells, {f"chat-{STEM}": 799_997_952, f"finetuned-{STEM}-500k": 499_968}).printed
    assert block.table[["SAE", "Budget (tokens)", "L0"]].to_numpy().tolist() == [
        ["Base", "0", "126.1"],
        ["Fine-tuned base (500k tokens)", "499,968", "86.0"],
        ["Chat from scratch", "500,000", "200.0"],
        ["Fine-tuned base (5M tokens)", "5,000,000", "86.0"],
        ["Chat (w131072)", "799,997,952", "101.7"],
    ]
    heads = ["L0", "CE Delta", "CE Loss rec %", "Explained Variance %", "MSE"]
    assert list(block.table.columns) == ["SAE", "Model", "Budget (tokens)", *heads]


def test_instruction_data_has_a_table_a_section_rollouts_first(tmp_path: Path) -> None:
    rows = [
        row(side, "chat", section=section)
        for section in ("control", "user_prompt", "rollout")
        for side in ("base", "chat")
    ]
    table = instruct_table(read_cells(make_run(tmp_path, rows), "cross_eval", "instruct"))
    assert [block.title.partition(" at ")[0] for block in table.printed] == [
        "Instruction data, on the rollout",
        "Instruction data, on the user prompt",
        "Instruction data, on the control tokens",
    ]
    assert list(table.printed[0].table["SAE"]) == ["Chat", "Base"]


def test_weights_are_pooled_over_layers_by_their_squares(tmp_path: Path) -> None:
    def part(layer: object, kind: str, base: float, difference: float) -> dict[str, object]:
        ratio = difference / base if base else ""
        of = {"n_parameters": 1000, "norm_base": base, "norm_chat": base, "norm_difference": difference}
        return {"layer": layer, "kind": kind, **of, "relative_difference": ratio, "cosine": 0.9}

    rows = [
        part(0, "q", 3.0, 3.0),
        part(1, "q", 4.0, 0.0),
        part("", "unembedding", 2.0, 1.0),
        part("", "embedding", 1.0, 0.5),
        part(0, "q_bias", 0.0, 0.0),
    ]
    write_csv(tmp_path / "weights/by_kind.csv", rows)
    (block,) = weight_table(Results(tmp_path)).printed
    assert block.table.to_numpy().tolist() == [
        ["embedding", "1,000", "0.5000", "", ""],
        ["attention q", "2,000", "0.6000", "0.0000 (layer 1)", "1.0000 (layer 0)"],
        ["unembedding", "1,000", "0.5000", "", ""],
        ["attention q bias", "1,000", "n/a", "", ""],
    ]


def test_activations_are_compared_raw_and_scaled_with_and_without_outliers(tmp_path: Path) -> None:
    spread = {"mean": 0.97, "median": 0.98, "p5": 0.9, "p95": 0.995}
    found = {"n_positions": 98304, "cosine": spread, "relative_distance": spread, "relative_distance_scaled": spread}
    write_json(tmp_path / "weights/activations.json", {"kept": found, "excluded": found | {"n_positions": 98100}})
    (block,) = activation_table(Results(tmp_path)).printed
    assert len(block.table) == 6
    assert list(block.table.iloc[3]) == ["Cosine", "without outliers", "98,100", "0.9700", "0.9800", "0.9000", "0.9950"]
