import math
from pathlib import Path

import pytest

from sae_transfer.report.gap_tables import equal_l0_table, judgements, verdict_table
from sae_transfer.report.results import read_cells
from sae_transfer.report.verdict import Gap, at_equal_l0, noise_floor, rule, threshold, verdict
from tests.report.runs import gap, make_run, post_rows, row, seed_gap

STEM = "standard-w131072"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-0.2, -0.1, "transfers"),
        (0.0, 0.0499, "transfers"),
        (0.0, 0.05, "undecided"),
        (0.0499, 0.0501, "undecided"),
        (0.05, 0.1, "undecided"),
        (0.0501, 0.1, "does not transfer"),
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_the_whole_interval_decides_and_an_end_on_the_limit_does_not(low: float, high: float, word: str) -> None:
    assert verdict(Gap((low + high) / 2, low, high), 0.05) == word


def test_the_limit_is_the_margin_or_the_noise_floor_whichever_is_larger() -> None:
    assert threshold(0.05, None) == 0.05
    assert threshold(0.05, 0.01) == 0.05
    assert threshold(0.05, 0.08) == 0.08
    assert "0.05 nats" in rule(0.05)


def test_the_noise_floor_is_the_absolute_gap_of_two_seeds_and_does_not_grow_with_their_number() -> None:
    assert noise_floor([]) is None
    assert noise_floor([float("nan")]) is None
    assert noise_floor([-0.03]) == pytest.approx(0.03)
    assert noise_floor([0.03, -0.03, 0.03]) == pytest.approx(0.03)
    assert noise_floor([0.03, 0.0]) == pytest.approx(0.03 / math.sqrt(2))


def test_a_frontier_is_interpolated_linearly_and_never_extrapolated() -> None:
    frontier = [(100.0, 0.1), (20.0, 0.5), (60.0, 0.2)]
    assert at_equal_l0(80.0, frontier).value == pytest.approx(0.15)
    assert at_equal_l0(30.0, frontier).value == pytest.approx(0.425)
    assert [at_equal_l0(l0, frontier).value for l0 in (20.0, 60.0, 100.0)] == pytest.approx([0.5, 0.2, 0.1])
    for outside in (19.99, 100.01):
        found = at_equal_l0(outside, frontier)
        assert math.isnan(found.value)
        assert found.reason == f"L0 {outside:.1f} is outside the native 20.0 to 100.0"
    assert at_equal_l0(20.0, [(20.0, 0.5)]).reason == "one native sparsity only"
    assert at_equal_l0(20.0, []).reason == "no native SAE"
    assert at_equal_l0(20.0, [(20.0, 0.5), (20.0, 0.3)]).value in (0.3, 0.5)
    assert math.isnan(at_equal_l0(20.0, [(10.0, 0.5), (30.0, float("nan"))]).value)


def two_seeds() -> list[dict[str, object]]:
    second = [
        row(side, model, sae=f"{side}-{STEM}-l1_3-s1", seed=1)
        for side in ("base", "chat")
        for model in ("base", "chat")
    ]
    return [*post_rows(), *second]


def test_verdicts_come_a_direction_with_the_noise_floor_of_the_native_sae(tmp_path: Path) -> None:
    back = gap(
        model="base",
        transferred=f"chat-{STEM}-l1_3-s0",
        native=f"base-{STEM}-l1_3-s0",
        ce_delta_low=0.06,
        ce_delta_high=0.08,
    )
    # Of the base model's SAEs and of base SAEs on the chat model: neither is the floor of base on chat.
    base_seeds = {"first": f"base-{STEM}-l1_3-s0", "second": f"base-{STEM}-l1_3-s1"}
    others = [seed_gap(0.5, model="chat") | base_seeds, seed_gap(0.07, model="base") | base_seeds]
    run = make_run(tmp_path, two_seeds(), [back, gap()], [seed_gap(-0.02), *others])
    found = judgements(read_cells(run, "cross_eval", "cross-eval"), 0.05)
    assert [(j.model, j.row["sae"], j.word) for j in found] == [
        ("chat", f"base-{STEM}-l1_3-s0", "transfers"),
        ("base", f"chat-{STEM}-l1_3-s0", "undecided"),
    ]
    assert [j.noise_floor for j in found] == pytest.approx([0.02, 0.07])
    assert [j.limit for j in found] == pytest.approx([0.05, 0.07])
    assert found[0].equal_l0.reason == "one native sparsity only"


def test_fine_tuned_saes_and_controls_are_not_judged(tmp_path: Path) -> None:
    tuned, control = row("finetuned", "chat"), row("chat", "chat", sae=f"control-{STEM}-l1_3-s0-5M")
    gaps = [gap(), gap(transferred=tuned["sae"]), gap(native=control["sae"])]
    run = make_run(tmp_path, [*post_rows(), tuned, control], gaps)
    assert [j.row["sae"] for j in judgements(read_cells(run, "cross_eval", "cross-eval"), 0.05)] == [
        f"base-{STEM}-l1_3-s0"
    ]


def test_the_verdict_table_prints_gap_limit_and_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path, two_seeds(), [gap()], [seed_gap(-0.02)])
    (block,) = verdict_table(read_cells(run, "cross_eval", "cross-eval"), 0.01).printed
    assert block.table.to_dict("records") == [
        {
            "SAE": "Base",
            "Model": "Chat",
            "Setting": "standard, w131072, l1 3, seed 0",
            "CE Delta gap [low, high]": "0.0123 [0.0100, 0.0150]",
            "Seed noise": "0.0200",
            "Limit": "0.0200",
            "Gap at equal L0": "n/a",
            "Verdict": "transfers",
        }
    ]


def test_gaps_at_equal_l0_are_taken_against_native_saes_of_other_sparsities_only(tmp_path: Path) -> None:
    def cell(side: str, model: str, l1: float, l0: float, delta: float, **more: object) -> dict[str, object]:
        sae = f"{side}-{STEM}-l1_{l1:g}-s0"
        return row(side, model, **{"sae": sae, "sparsity_value": l1, "l0": l0, "ce_delta": delta, **more})

    rows = [
        cell("chat", "chat", 2, 100, 0.1),
        cell("chat", "chat", 4, 60, 0.2),
        cell("base", "chat", 2, 120, 0.15),
        cell("base", "chat", 4, 80, 0.25),
        # None of these is on the frontier: another width, another seed, another model.
        cell("chat", "chat", 8, 79, 9.0, d_sae=64, sae="chat-standard-w64-l1_8-s0"),
        cell("chat", "chat", 4, 81, 9.0, seed=1, sae=f"chat-{STEM}-l1_4-s1"),
        cell("base", "base", 4, 80, 9.0),
    ]
    run = make_run(tmp_path, rows, [])
    (block,) = equal_l0_table(read_cells(run, "cross_eval", "cross-eval")).printed
    lines = block.table.to_dict("records")
    columns = ("SAE", "L0", "Value", "Native at this L0", "Gap", "Note")
    assert [[line[column] for column in columns] for line in lines if line["Metric"] == "CE Delta"] == [
        ["Base (l1 2)", "120.0", "0.1500", "n/a", "n/a", "L0 120.0 is outside the native 60.0 to 100.0"],
        ["Base (l1 4)", "80.0", "0.2500", "0.1500", "0.1000", ""],
    ]


def test_without_a_second_sparsity_there_is_no_table_at_equal_l0(tmp_path: Path) -> None:
    assert equal_l0_table(read_cells(make_run(tmp_path, post_rows()), "cross_eval", "cross-eval")).printed == []
