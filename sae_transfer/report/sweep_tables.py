"""The tables of a sweep: the post's columns and verdicts by pair, with layer and width; the cells without results."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from sae_transfer.report.cells import SAE_LABELS, Policy, policies, post_order, role, telling, traits
from sae_transfer.report.formats import Line, Table
from sae_transfer.report.gap_tables import VERDICTS, Judgement, judgements, sides, verdict_line
from sae_transfer.report.results import Row, number
from sae_transfer.report.sweep_results import Group, Missing, ModelPair
from sae_transfer.report.tables import post_line

Item = TypeVar("Item")
Entry = tuple[Group, Item]


def sweep_cross_eval_table(groups: Sequence[Group], leading: Sequence[str]) -> Table:
    """The post's table, a block a pair and policy.

    Args:
        groups: All that have results.
        leading: The columns that place a row in the sweep, for the CSV.

    Returns:
        The table.
    """
    entries = [(group, row) for group in groups for row in group.cells.rows]
    settings = _settings(entries)

    def line(entry: Entry[Row]) -> Line:
        group, row = entry
        known = role(row)
        head = {
            "SAE": row["sae"] if known == "external" else SAE_LABELS[known],
            "Model": row["model"].capitalize(),
            **_where(group, row, settings),
        }
        return _placed(post_line(head, row), group, row, leading)

    return _by_pair("cross_eval", "Cross-evaluation", entries, lambda row: row, line)


def sweep_verdict_table(groups: Sequence[Group], leading: Sequence[str]) -> Table:
    """Gaps in CE delta with their intervals and verdicts, a block a pair and policy.

    Args:
        groups: All that have results.
        leading: The columns that place a row in the sweep, for the CSV.

    Returns:
        The table.
    """
    settings = _settings([(group, row) for group in groups for row in group.cells.rows])

    def line(entry: Entry[Judgement]) -> Line:
        group, found = entry
        head = sides(found) | _where(group, found.row, settings)
        return _placed(verdict_line(head, found), group, found.row, leading)

    return _by_pair("verdict", VERDICTS, judged(groups), lambda found: found.row, line)


def judged(groups: Sequence[Group]) -> list[Entry[Judgement]]:
    """All verdicts of a sweep, each by its own study's margin."""
    return [(group, found) for group in groups for found in judgements(group.cells, group.margin)]


def missing_table(missing: Sequence[Missing]) -> Table:
    """The cells without results, with what their jobs say."""
    lines = []
    for cell in missing:
        of = {"Cell": cell.id, "Study": cell.study, "State": cell.state or "not known", "Message": cell.message}
        lines.append(Line(of, of))
    return Table("missing", [("Cells without results.", lines)])


def _by_pair(
    name: str,
    subject: str,
    entries: Sequence[Entry[Item]],
    row_of: Callable[[Item], Row],
    line: Callable[[Entry[Item]], Line],
) -> Table:
    places = {group: place for place, (group, _) in enumerate(entries)}

    def order(entry: Entry[Item]) -> tuple[object, ...]:
        group, row = entry[0], row_of(entry[1])
        sparsity = number(row, "sparsity_value") if row["sparsity_value"] else 0.0
        return (group.layer, int(row["d_sae"]), places[group], sparsity, row["seed"], post_order(row), row["sae"])

    found = []
    for pair in dict.fromkeys(group.pair for group, _ in entries):
        own = sorted((entry for entry in entries if entry[0].pair == pair), key=order)
        for policy in policies(row_of(item) for _, item in own):
            lines = [line(entry) for entry in own if Policy.of(row_of(entry[1])) == policy]
            found.append((_title(subject, pair, policy), lines))
    return Table(name, found)


def _title(subject: str, pair: ModelPair, policy: Policy) -> str:
    return f"{subject}: {pair.words}; {policy.words}."


Settings = dict[tuple[Group, str], str]


def _settings(entries: Sequence[Entry[Row]]) -> Settings:
    """(group, SAE) -> what tells it from others of its pair beside role, layer and width."""
    found: Settings = {}
    keys = list(dict.fromkeys(key for group, _ in entries for key in group.settings))
    for pair in dict.fromkeys(group.pair for group, _ in entries):
        own = {(group, row["sae"]): _traits(group, row, keys) for group, row in entries if group.pair == pair}
        found |= telling(own)
    return found


def _traits(group: Group, row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    architecture, _, *rest = traits(row)
    hook = group.hook_name.rpartition(".hook_")[2]
    return (architecture, *rest, hook, *(f"{key} {group.settings.get(key, '')}" for key in keys), group.study)


def _where(group: Group, row: Row, settings: Settings) -> dict[str, str]:
    where = {"Layer": str(group.layer), "Width": row["d_sae"]}
    return where | ({"Setting": settings[group, row["sae"]]} if any(settings.values()) else {})


def _placed(line: Line, group: Group, row: Row, leading: Sequence[str]) -> Line:
    """A line whose unrounded form begins with the row's place in the sweep."""
    place = {name: row.get(name, "") for name in leading}
    return line._replace(exact={**place, "base_model": group.pair.base, "chat_model": group.pair.chat, **line.exact})
