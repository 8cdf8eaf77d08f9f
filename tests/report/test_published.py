from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sae_transfer.report.published import find_pair, published, published_outlier_table, published_table, same_site
from sae_transfer.report.results import Results
from tests.report.runs import POST, make_run, row, write_csv, write_study

MISTRAL = {"base": "mistralai/Mistral-7B-v0.1", "chat": "mistralai/Mistral-7B-Instruct-v0.1"}
CHECKOUT = Path(__file__).parents[2]


def test_the_results_directory_holds_the_same_file_as_the_package() -> None:
    packaged = files("sae_transfer.report").joinpath("published.json").read_text(encoding="utf-8")
    assert (CHECKOUT / "results/published/published.json").read_text(encoding="utf-8") == packaged


def test_the_published_numbers_are_those_of_the_posts_tables_and_name_their_source() -> None:
    found = published()
    assert found["source"]["url"].startswith("https://www.alignmentforum.org/")
    assert len(found["cells"]) == 28
    assert sum(cell["printed"] for cell in found["cells"]) == 2
    cells = {
        (c["sae_trained_on"], c["model"]): c
        for c in found["cells"]
        if c["pair"] == "mistral-7b" and c["table"] == "cross_eval"
    }
    for cell, (l0, recovered, clean, sae, explained, mse) in POST.items():
        ours = [
            cells[cell][name]
            for name in ("l0", "ce_recovered", "ce_clean", "ce_sae", "explained_variance_per_token", "mse")
        ]
        assert ours == pytest.approx([l0, recovered, clean, sae, explained, mse], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "pair"),
    [
        ({"pair": MISTRAL}, "mistral-7b"),
        (
            {
                "pair": {side: name.lower() for side, name in MISTRAL.items()},
                "site": {"layer": 15, "hook": "resid_post"},
            },
            "mistral-7b",
        ),
        ({"pair": MISTRAL, "site": {"layer": 15, "hook": "resid_pre"}}, None),
        ({"pair": MISTRAL, "site": {"layer": 16, "hook": "mlp_out"}}, None),
        ({"pair": {"base": MISTRAL["base"], "chat": MISTRAL["base"]}}, None),
        ({}, None),
    ],
)
def test_a_pair_is_the_posts_when_both_models_and_the_site_are(
    tmp_path: Path, changes: dict[str, Any], pair: str | None
) -> None:
    assert find_pair(write_study(tmp_path, **changes)) == pair
    assert find_pair(None) is None


def test_the_end_of_a_layer_is_the_start_of_the_next() -> None:
    assert same_site("blocks.8.hook_resid_post", "blocks.9.hook_resid_pre")
    assert not same_site("blocks.9.hook_resid_post", "blocks.9.hook_resid_pre")
    assert not same_site("blocks.8.hook_mlp_out", "blocks.9.hook_mlp_out")


def test_published_ours_and_their_difference_stand_together(tmp_path: Path) -> None:
    write_study(tmp_path, pair=MISTRAL)
    rows = [
        row("base", "chat", l0=127.0, ce_sae=1.9, ce_delta=1.9 - 1.7047595977783203),
        row("base", "chat", scale="raw"),
        row("base", "chat", outliers="kept"),
        row("chat", "chat", sae="control-standard-w131072-l1_3-s0-5M"),
    ]
    make_run(tmp_path, rows, [])
    blocks = published_table(Results(tmp_path)).printed
    assert [block.title.partition(":")[0] for block in blocks] == ["Cross-evaluation, text", "Fine-tuning, text"]
    lines = blocks[0].table[["SAE", "Model", "Source", "L0", "CE Delta"]].to_numpy().tolist()
    assert lines == [
        # The published delta from unrounded values is 0.0984; the post's table prints 0.10.
        ["Base", "Chat", "post", "126.1", "0.0984"],
        ["Base", "Chat", "ours", "127.0", "0.1952"],
        ["Base", "Chat", "difference", "0.9", "0.0969"],
    ]
    assert list(blocks[1].table["Source"]) == ["post (table, truncated)", "ours", "difference"]
    assert blocks[1].table["MSE"].tolist()[0] == "724350"


def test_other_pairs_are_compared_with_nothing(tmp_path: Path) -> None:
    write_study(tmp_path)
    make_run(tmp_path, [row("base", "chat")], [])
    assert published_table(Results(tmp_path)).printed == []
    assert published_outlier_table(Results(tmp_path)).printed == []


def test_the_posts_outliers_stand_beside_ours(tmp_path: Path) -> None:
    write_study(tmp_path, pair=MISTRAL)
    of = {"model": "base", "norm_scale": 11.58, "threshold": 200.0, "threshold_source": "given", "n_tokens": 98304}
    write_csv(
        tmp_path / "outliers/rows.csv",
        [{**of, "n_outliers": 98, "fraction": 0.000997, "kind": "bos_first", "n_kind": 98, "share": 1.0}],
    )
    (block,) = published_outlier_table(Results(tmp_path)).printed
    assert block.table.to_numpy().tolist() == [
        ["Base", "post", "200", "0.001872", "63% BOS, 26% first newline token, 11% paragraph symbols"],
        ["Base", "ours", "200", "0.000997", "100% BOS at position 0"],
    ]
