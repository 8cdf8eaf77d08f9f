"""The tables of gaps: transferred against native beside seed against seed, at equal L0, and the verdicts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sae_transfer.config import SIDES
from sae_transfer.report.cells import Block, Policy, Role, blocks, is_native, role, settings, traits
from sae_transfer.report.columns import METRICS, WITHOUT_GAP
from sae_transfer.report.formats import Line, Table
from sae_transfer.report.results import Cells, Row, number
from sae_transfer.report.verdict import AtEqualL0, Gap, Word, at_equal_l0, noise_floor, threshold, verdict

GAP_METRICS = tuple(name for name in METRICS if name not in WITHOUT_GAP)
EQUAL_L0_METRICS = tuple(name for name in GAP_METRICS if name not in ("l0", "frac_alive"))
DIRECTIONS = {"chat": "base SAE on chat model", "base": "chat SAE on base model"}
"""Evaluated model -> the direction of transfer that ends there."""

VERDICTS = "Verdicts on the gap in CE delta, nats, against the margin or the seed noise if larger"

COMPARISONS: dict[Role, str] = {"finetuned": "fine-tuning", "control": "from scratch"}
"""Role -> what its gap to the native SAE tells, where that is not the transfer of an SAE as it is."""


@dataclass(frozen=True)
class Judgement:
    """A verdict on one SAE in one direction, with all that it rests on."""

    row: Row
    gap: Gap
    noise_floor: float | None
    limit: float
    word: Word
    equal_l0: AtEqualL0
    """Gap in CE delta to the native frontier at the same L0."""

    @property
    def policy(self) -> Policy:
        """What the row shares with others of its table."""
        return Policy.of(self.row)

    @property
    def model(self) -> str:
        """The model on which the SAE was not trained."""
        return self.row["model"]


def judgements(cells: Cells, margin: float) -> list[Judgement]:
    """Judge every SAE that stands on the model it was not trained on.

    Args:
        cells: The cross-evaluation.
        margin: report.margin, nats.

    Returns:
        Base on chat first, then chat on base; in each, policies and SAEs in the order of the tables. Fine-tuned SAEs
        and controls have seen the model, and are not judged.
    """
    found = []
    for block in blocks(cells.rows):
        cell = {(row["sae"], row["model"]): row for row in block.rows}
        for gap in cells.transfer:
            if Policy.of(gap) != block.policy:
                continue
            row, native = (cell[gap[end], gap["model"]] for end in ("transferred", "native"))
            if row["sae_trained_on"] not in SIDES or "control" in (role(row), role(native)):
                continue
            interval = Gap(*(number(gap, f"ce_delta_{end}") for end in ("gap", "low", "high")))
            floor = _noise_floor(cells.seeds, cell, native)
            limit = threshold(margin, floor)
            equal_l0 = _equal_l0_gap(block, row, "ce_delta")
            found.append(Judgement(row, interval, floor, limit, verdict(interval, limit), equal_l0))
    return sorted(found, key=lambda judgement: list(DIRECTIONS).index(judgement.model))


def verdict_table(cells: Cells, margin: float) -> Table:
    """A line a judgement, with the gap, the limit it is held against, and the verdict; a block a policy."""
    judged = judgements(cells, margin)
    return Table(
        "verdict",
        [
            (f"{VERDICTS}; {policy.words}.", [verdict_line(_verdict_head(j), j) for j in judged if j.policy == policy])
            for policy in dict.fromkeys(found.policy for found in judged)
        ],
    )


def _verdict_head(found: Judgement) -> dict[str, str]:
    return {**sides(found), "Setting": ", ".join(filter(None, traits(found.row)))}


def sides(found: Judgement) -> dict[str, str]:
    """Whose SAE on which model."""
    return {"SAE": "Base" if found.model == "chat" else "Chat", "Model": found.model.capitalize()}


def verdict_line(head: Mapping[str, str], found: Judgement) -> Line:
    """The gap, the limit it is held against, and the verdict, after the columns that say whose they are."""
    metric = METRICS["ce_delta"]
    floor = float("nan") if found.noise_floor is None else found.noise_floor
    values = {"Seed noise": floor, "Limit": found.limit, "Gap at equal L0": found.equal_l0.value}
    printed = {name: metric.printed(value) for name, value in values.items()}
    exact = {"CE Delta gap": found.gap.value, "Low": found.gap.low, "High": found.gap.high, **values}
    shown, word = {"CE Delta gap [low, high]": metric.interval(*found.gap)}, {"Verdict": found.word}
    more = {"sae_id": found.row["sae"], **found.policy._asdict(), "equal_l0_reason": found.equal_l0.reason}
    return Line({**head, **shown, **printed, **word}, {**head, **exact, **word, **more})


def transfer_table(cells: Cells, name: str = "transfer") -> Table:
    """Paired gaps with their intervals: transferred minus native, and seed minus seed as their noise floor."""
    subject = "SAE minus the one it is held against, paired, with its 95% bootstrap interval"
    return Table(name, [(f"{subject} {b.circumstances()}", list(_gap_lines(b, cells))) for b in blocks(cells.rows)])


def equal_l0_table(cells: Cells) -> Table:
    """Each SAE held against the frontier of native SAEs of other sparsities at its own L0; empty without a frontier."""
    found = []
    for block in blocks(cells.rows):
        lines = []
        for row in block.rows:
            if is_native(row) or role(row) == "external" or len(_frontier(block, row, "ce_delta")) < 2:
                continue
            for name in EQUAL_L0_METRICS:
                metric = METRICS[name]
                of = {"SAE": block.labels[row["sae"]], "Model": row["model"].capitalize(), "Metric": metric.label}
                native = at_equal_l0(number(row, "l0"), _frontier(block, row, name))
                value = number(row, name)
                values = {"Value": value, "Native at this L0": native.value, "Gap": value - native.value}
                printed = {head: metric.printed(number_) for head, number_ in values.items()}
                exact = {head: metric.shown(number_) for head, number_ in values.items()}
                l0, note = number(row, "l0"), {"Note": native.reason}
                more = {"metric_id": name, "sae_id": row["sae"], **block.policy._asdict()}
                lines.append(
                    Line(
                        {**of, "L0": METRICS["l0"].printed(l0), **printed, **note},
                        {**of, "L0": l0, **exact, **note, **more},
                    )
                )
        subject = (
            "Gaps at equal L0: the frontier of native SAEs, interpolated linearly and never extrapolated; no intervals"
        )
        found.append((f"{subject}; {block.circumstances()}", lines))
    return Table("equal_l0", found)


def _gap_lines(block: Block, cells: Cells) -> Iterator[Line]:
    trained = {row["sae"]: row for row in block.rows}
    ends = (("transferred", "native"), ("first", "second"))
    pairs = [(gap, *keys) for gaps, keys in zip((cells.transfer, cells.seeds), ends, strict=True) for gap in gaps]
    for gap, first, second in pairs:
        if Policy.of(gap) != block.policy:
            continue
        comparison = "seeds" if first == "first" else COMPARISONS.get(role(trained[gap[first]]), "transfer")
        of = {
            "Comparison": comparison,
            "SAE": block.labels[gap[first]],
            "Against": block.labels[gap[second]],
            "Model": gap["model"].capitalize(),
        }
        more = {"sae_id": gap[first], "against_id": gap[second], **block.policy._asdict()}
        for name in GAP_METRICS:
            if f"{name}_gap" not in gap:
                continue
            metric = METRICS[name]
            values = [number(gap, f"{name}_{end}") for end in ("gap", "low", "high")]
            printed = {"Metric": metric.label, "Gap [low, high]": metric.interval(*values)}
            exact = dict(zip(("Gap", "Low", "High"), map(metric.shown, values), strict=True))
            yield Line(of | printed, {**of, "Metric": metric.label, **exact, "metric_id": name, **more})


def _noise_floor(seeds: Iterable[Row], cell: dict[tuple[str, str], Row], native: Row) -> float | None:
    """Between SAEs of the native one's model and settings, evaluated on that model, that differ in the seed."""
    gaps = []
    for gap in seeds:
        first = cell.get((gap["first"], gap["model"]))
        if Policy.of(gap) != Policy.of(native) or gap["model"] != native["model"] or first is None:
            continue
        if (
            role(first) == role(native)
            and is_native(first)
            and settings(first, seed=False) == settings(native, seed=False)
        ):
            gaps.append(number(gap, "ce_delta_gap"))
    return noise_floor(gaps)


def _frontier(block: Block, row: Row, metric: str) -> list[tuple[float, float]]:
    """(L0, metric) of the model's own SAEs that differ from a row's in sparsity at most."""
    own = ("architecture", "d_sae", "sparsity_key", "seed")
    return [
        (number(other, "l0"), number(other, metric))
        for other in block.rows
        if other["model"] == row["model"] and role(other) == row["model"] and all(other[key] == row[key] for key in own)
    ]


def _equal_l0_gap(block: Block, row: Row, metric: str) -> AtEqualL0:
    native = at_equal_l0(number(row, "l0"), _frontier(block, row, metric))
    return AtEqualL0(number(row, metric) - native.value, native.reason)
