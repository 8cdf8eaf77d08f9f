import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from sae_transfer.analysis import metrics
from sae_transfer.analysis.rows import CellLabel
from sae_transfer.errors import StudyError
from sae_transfer.report.columns import CONTEXT, METRICS
from sae_transfer.report.gap_tables import transfer_table
from sae_transfer.report.results import read_cells
from sae_transfer.report.tables import cross_eval_blocks, cross_eval_table, long_table
from tests.report.runs import POST, ROWS, TABLES, gap, make_run, post_rows, row, seed_gap


def write_tables(run: Path) -> list[Path]:
    """The tables that a cross-evaluation alone gives, as the report writes them."""
    cells = read_cells(run, "cross_eval", "cross-eval")
    tables = (cross_eval_table(cells), long_table(cells), transfer_table(cells))
    return [path for table in tables for path in table.write(run / TABLES)]


def labels(run: Path) -> list[tuple[str, str]]:
    table = cross_eval_blocks(run)[0].table
    return list(zip(table["SAE"], table["Model"], strict=True))


def test_every_column_that_the_stage_writes_is_known() -> None:
    assert set(METRICS) == set(metrics.METRICS)
    counts = {"n_tokens", "n_loss_tokens", "n_outliers", "n_sequences"}
    assert {*CONTEXT, "model"} == {field.name for field in fields(CellLabel)} | counts


def test_the_posts_table_is_printed_with_its_columns_its_order_and_rounded_values(tmp_path: Path) -> None:
    write_tables(make_run(tmp_path, post_rows()))
    assert (
        (tmp_path / TABLES / "cross_eval.md").read_text()
        == """\
**Cross-evaluation at blocks.16.hook_resid_pre, SAE width 131072, outliers excluded above scaled norm 200 \
(base 48, chat 51 of 98,304 positions), matched scale, 98,304 tokens in 48 sequences.**

| SAE | Model | L0 | CE Loss rec % | Clean CE Loss | SAE CE Loss | CE Delta | 0 Abl. CE loss \
| Explained Variance % | MSE |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| Base | Base | 95.2 | 98.71 | 1.5195 | 1.6331 | 0.1136 | 10.3735 | 68.2 | 1014 |
| Chat | Base | 72.2 | 96.83 | 1.5195 | 1.7997 | 0.2802 | 10.3735 | 52.7 | 1503 |
| Chat | Chat | 101.7 | 99.02 | 1.7048 | 1.7896 | 0.0848 | 10.3735 | 69.2 | 1055 |
| Base | Chat | 126.1 | 98.86 | 1.7048 | 1.8031 | 0.0984 | 10.3735 | 61.0 | 1328 |
"""
    )


def test_csv_has_the_posts_columns_first_and_every_digit_of_the_rows(tmp_path: Path) -> None:
    write_tables(make_run(tmp_path, post_rows()))
    table = pd.read_csv(tmp_path / TABLES / "cross_eval.csv")
    head = ["SAE", "Model", "L0", "CE Loss rec %", "Clean CE Loss", "SAE CE Loss", "CE Delta", "0 Abl. CE loss"]
    assert list(table.columns[:10]) == [*head, "Explained Variance %", "MSE"]
    assert list(table.columns[10:]) == ["section", "sae_id", *CONTEXT[2:]]
    base_on_chat = table.iloc[3]
    l0, recovered, clean, sae, explained, mse = POST["base", "chat"]
    assert base_on_chat["L0"] == l0
    assert base_on_chat["CE Loss rec %"] == 100 * recovered
    assert base_on_chat["CE Delta"] == sae - clean
    assert base_on_chat["Explained Variance %"] == 100 * explained
    assert base_on_chat["MSE"] == mse
    assert base_on_chat["sae_id"] == "base-standard-w131072-l1_3-s0"
    assert base_on_chat["norm_scale"] == 11.576960263941084


def test_the_rows_and_gaps_read_are_left_as_they_were(tmp_path: Path) -> None:
    run = make_run(tmp_path, post_rows())
    before = [(run / "cross_eval" / name).read_bytes() for name in ("rows.csv", "transfer.csv")]
    write_tables(run)
    assert [(run / "cross_eval" / name).read_bytes() for name in ("rows.csv", "transfer.csv")] == before


def test_writing_again_gives_the_same_nine_files_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path, post_rows())
    paths = write_tables(run)
    contents = [path.read_bytes() for path in paths]
    assert write_tables(run) == paths
    assert [path.read_bytes() for path in paths] == contents
    names = [
        f"{stem}.{kind}" for stem in ("cross_eval", "cross_eval_long", "transfer") for kind in ("csv", "md", "tex")
    ]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (run / TABLES).iterdir()) == sorted(names)


def test_there_is_a_block_for_each_filter_and_scale_excluded_and_matched_first(tmp_path: Path) -> None:
    policies = [("kept", "raw"), ("kept", "matched"), ("excluded", "raw"), ("excluded", "matched")]
    rows = [r for outliers, scale in policies for r in post_rows(outliers=outliers, scale=scale)]
    titles = [block.title for block in cross_eval_blocks(make_run(tmp_path, rows))]
    found = [("excluded" if "excluded" in t else "kept", "raw" if "raw scale" in t else "matched") for t in titles]
    assert found == list(reversed(policies))
    assert "outliers kept, matched scale" in titles[2]


def test_title_gives_one_count_when_both_models_have_the_same_and_says_when_batches_are_averaged(
    tmp_path: Path,
) -> None:
    run = make_run(
        tmp_path, post_rows(n_tokens=98304 - 1024, n_outliers=1024, outlier_threshold=22.63, averaging="batch")
    )
    title = cross_eval_blocks(run)[0].title
    assert "above scaled norm 22.63 (1,024 of 98,304 positions)" in title
    assert title.endswith("98,304 tokens in 48 sequences, averaged by batch.")


def test_finetuned_saes_come_after_the_posts_cells_and_external_ones_last_by_their_name(tmp_path: Path) -> None:
    mine = {"sae": "mine_50%|x", "seed": "", "sparsity_value": "", "sparsity_key": ""}
    rows = [row("chat", "base", **mine), row("base", "base", **mine), row("finetuned", "chat"), *post_rows()]
    run = make_run(tmp_path, rows)
    assert labels(run)[4:] == [("Fine-tuned base", "Chat"), ("mine_50%|x", "Base"), ("mine_50%|x", "Base")]
    write_tables(run)
    assert r"| mine_50%\|x | Base |" in (run / TABLES / "cross_eval.md").read_text()
    assert r"mine\_50\%\textbar{}x & Base &" in (run / TABLES / "cross_eval.tex").read_text()


def test_an_external_sae_called_na_keeps_its_name(tmp_path: Path) -> None:
    assert labels(make_run(tmp_path, [row("base", "chat", sae="NA")], [])) == [("NA", "Chat")]


def test_several_saes_of_a_role_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    def variant(width: int, l1: float, seed: int) -> dict[str, object]:
        name = f"base-standard-w{width}-l1_{l1:g}-s{seed}"
        return row("base", "base", sae=name, d_sae=width, sparsity_value=l1, seed=seed)

    rows = [variant(1024, 5.0, 1), variant(2048, 5.0, 0), variant(1024, 0.5, 0), row("chat", "base")]
    run = make_run(tmp_path, rows, [])
    assert [sae for sae, _ in labels(run)] == [
        "Base (w1024, l1 5, seed 1)",
        "Base (w2048, l1 5, seed 0)",
        "Base (w1024, l1 0.5, seed 0)",
        "Chat",
    ]
    assert "SAE widths 1024, 2048, 131072," in cross_eval_blocks(run)[0].title


def test_fine_tuned_saes_are_told_apart_by_their_budget(tmp_path: Path) -> None:
    tail = "standard-w131072-l1_3-s0"
    rows = [row("finetuned", "chat", sae=f"finetuned-{tail}-{budget}") for budget in ("5M", "50M")]
    found = labels(make_run(tmp_path, rows, []))
    assert found == [("Fine-tuned base (5M tokens)", "Chat"), ("Fine-tuned base (50M tokens)", "Chat")]


def test_saes_without_a_budget_that_share_every_trait_are_told_apart_by_their_id(tmp_path: Path) -> None:
    rows = [row("base", "base", sae=f"base-standard-w131072-{end}", seed="", sparsity_key="") for end in ("a", "b")]
    assert [sae for sae, _ in labels(make_run(tmp_path, rows, []))] == [
        "Base (standard-w131072-a)",
        "Base (standard-w131072-b)",
    ]


def test_a_chat_sae_from_scratch_on_a_small_budget_is_not_called_a_chat_sae(tmp_path: Path) -> None:
    rows = [
        row("chat", "chat"),
        row("chat", "chat", sae="control-standard-w131072-l1_3-s0-5M"),
        row("finetuned", "chat"),
    ]
    assert labels(make_run(tmp_path, rows, [])) == [
        ("Chat", "Chat"),
        ("Fine-tuned base", "Chat"),
        ("Chat from scratch", "Chat"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        ("mse", 724350.3, "724350"),
        ("mse", 999.96, "1000"),
        ("mse", 198.64801, "198.6"),
        ("mse", 0.00123456, "0.001235"),
        ("mse", 0.0, "0.000"),
        ("ce_delta", -0.0849, "-0.0849"),
        ("ce_delta", -0.00004, "0.0000"),
        ("ce_recovered", 1.00905, "100.91"),
        ("explained_variance_per_token", -14.991045951843262, "-1499.1"),
        ("l0", 44.16, "44.2"),
        ("ce_recovered", float("nan"), "n/a"),
        ("mse", float("inf"), "inf"),
    ],
)
def test_values_are_rounded_to_their_metrics_precision(name: str, value: float, printed: str) -> None:
    assert METRICS[name].printed(value) == printed


def test_an_undefined_metric_reads_na_and_is_empty_in_csv(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row("base", "base", ce_recovered="")], [])
    write_tables(run)
    assert "| Base | Base | 95.2 | n/a | 1.5195 |" in (run / TABLES / "cross_eval.md").read_text()
    assert (run / TABLES / "cross_eval.csv").read_text().splitlines()[1].startswith("Base,Base,95.189697265625,,1.519")


def test_the_long_form_has_a_line_for_each_cell_and_metric_with_its_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path, post_rows())
    write_tables(run)
    table = pd.read_csv(run / TABLES / "cross_eval_long.csv")
    assert list(table.columns[:7]) == ["SAE", "Model", "Metric", "Value", "Low", "High", "metric_id"]
    assert len(table) == len(POST) * len(METRICS)
    chat = table[(table["SAE"] == "Chat") & (table["Model"] == "Chat")].set_index("metric_id")
    interval = [chat.at["ce_recovered", end] for end in ("Value", "Low", "High")]
    assert interval == pytest.approx([99.01690483, 0.9 * 99.01690483, 1.1 * 99.01690483])
    markdown = (run / TABLES / "cross_eval_long.md").read_text()
    assert "| SAE | Model | Metric | Value | Low | High |\n| --- | --- | --- | ---: | ---: | ---: |\n" in markdown
    assert "| Base | Base | L0 | 95.2 | 85.7 | 104.7 |\n" in markdown


def test_gaps_are_printed_with_their_interval_in_the_units_of_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path, post_rows())
    write_tables(run)
    markdown = (run / TABLES / "transfer.md").read_text()
    assert markdown.startswith(
        "**SAE minus the one it is held against, paired, with its 95% bootstrap interval at blocks.16."
    )
    assert markdown.endswith(
        """
| Comparison | SAE | Against | Model | Metric | Gap [low, high] |
| --- | --- | --- | --- | --- | ---: |
| transfer | Base | Chat | Chat | CE Delta | 0.0123 [0.0100, 0.0150] |
| transfer | Base | Chat | Chat | Explained Variance % | -8.3 [-9.0, 0.0] |
"""
    )
    table = pd.read_csv(run / TABLES / "transfer.csv").set_index("metric_id")
    assert table.loc["ce_delta", ["Gap", "Low", "High"]].tolist() == [0.01234, 0.00996, 0.015]
    assert table.at["ce_delta", "sae_id"] == "base-standard-w131072-l1_3-s0"


def test_gaps_between_seeds_stand_in_the_same_table_as_a_noise_floor(tmp_path: Path) -> None:
    second = row("chat", "chat", sae="chat-standard-w131072-l1_3-s1", seed=1)
    tuned = row("finetuned", "chat")
    gaps = [gap(), gap(transferred=tuned["sae"])]
    write_tables(make_run(tmp_path, [*post_rows(), second, tuned], gaps, [seed_gap(-0.0042)]))
    lines = [line for line in (tmp_path / TABLES / "transfer.md").read_text().splitlines() if "CE Delta" in line]
    assert lines == [
        "| transfer | Base | Chat (seed 0) | Chat | CE Delta | 0.0123 [0.0100, 0.0150] |",
        "| fine-tuning | Fine-tuned base | Chat (seed 0) | Chat | CE Delta | 0.0123 [0.0100, 0.0150] |",
        "| seeds | Chat (seed 0) | Chat (seed 1) | Chat | CE Delta | -0.0042 [-0.0052, -0.0032] |",
    ]


def test_without_gaps_there_is_no_transfer_table_nor_an_old_one(tmp_path: Path) -> None:
    write_tables(make_run(tmp_path, post_rows()))
    paths = write_tables(make_run(tmp_path, post_rows(), []))
    assert len(paths) == 6
    assert not list((tmp_path / TABLES).glob("transfer.*"))


def test_latex_is_escaped_uses_booktabs_rules_and_splits_what_is_longer_than_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, post_rows())
    write_tables(run)
    post, long = ((run / TABLES / f"{name}.tex").read_text() for name in ("cross_eval", "cross_eval_long"))
    assert r"blocks.16.hook\_resid\_pre" in post
    assert r"\shortstack{CE Loss\\rec \%}" in post
    assert "\nBase & Chat & 126.1 & 98.86 & 1.7048 & 1.8031 & 0.0984 & 10.3735 & 61.0 & 1328 \\\\\n" in post
    assert not re.search(r"(?<!\\)[%_#]", post + long)
    assert [post.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert long.count(r"\begin{table}") == 2
    assert long.count("(Continued.)") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_latex_compiles_with_booktabs_alone_and_no_table_leaves_the_page(tmp_path: Path) -> None:
    hostile = r"[_&#%^{~\|"
    run = make_run(tmp_path, [*post_rows(), row("base", "chat", sae=hostile), row("finetuned", "chat")])
    inputs = "".join(rf"\input{{{path}}}" for path in write_tables(run) if path.suffix == ".tex")
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "document.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "Overfull \\hbox" not in result.stdout
    assert "Float too large" not in result.stdout


@pytest.mark.parametrize("name", ["rows.csv", "transfer.csv"])
def test_a_run_without_cross_evaluation_is_told_which_verb_makes_it(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, post_rows())
    (run / "cross_eval" / name).unlink()
    with pytest.raises(StudyError, match=rf"{name}: not there[^$]*sae-transfer cross-eval CONFIG"):
        write_tables(run)
    assert not (run / "report").exists()


def test_rows_that_are_cut_short_or_empty_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{k: v for k, v in r.items() if k not in ("mse", "kl_low")} for r in post_rows()])
    with pytest.raises(StudyError, match="lacks the columns mse, kl_low"):
        cross_eval_blocks(run)
    make_run(run, post_rows()[:1])
    (run / ROWS).write_text((run / ROWS).read_text().splitlines()[0] + "\n")
    with pytest.raises(StudyError, match="has no rows"):
        cross_eval_blocks(run)
    (run / ROWS).write_text("")
    with pytest.raises(StudyError, match="not readable"):
        cross_eval_blocks(run)
