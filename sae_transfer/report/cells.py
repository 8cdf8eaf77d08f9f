"""Rows of rows.csv in the post's order and words: which SAE plays which role, and what it is called."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from sae_transfer.report.results import Row, number

Key = TypeVar("Key", bound=Hashable)
Role = Literal["base", "chat", "finetuned", "control", "external"]

SAE_LABELS: dict[Role, str] = {
    "base": "Base",
    "chat": "Chat",
    "finetuned": "Fine-tuned base",
    "control": "Chat from scratch",
}
CELL_ORDER = (
    *(("base", "base"), ("chat", "base"), ("chat", "chat"), ("base", "chat")),
    *(("finetuned", "chat"), ("control", "chat")),
)
"""(role, evaluated on), in the post's order."""

SECTIONS = {"pile": "text", "rollout": "rollout", "user_prompt": "user prompt", "control": "control tokens"}
"""In the order of tables, with the words for them."""


class Policy(NamedTuple):
    """What cells must share to stand in one table."""

    section: str
    outliers: str
    scale: str

    @classmethod
    def of(cls, row: Row) -> "Policy":
        """The policy of a row, of a gap too."""
        return cls(row["section"], row["outliers"], row["scale"])

    @property
    def name(self) -> str:
        """For the name of a file."""
        return f"{self.outliers}_{self.scale}"

    @property
    def words(self) -> str:
        """For a title."""
        return f"outliers {self.outliers}, {self.scale} scale"


class Block(NamedTuple):
    """The rows that share a policy, in the post's order."""

    rows: list[Row]
    labels: dict[str, str]
    """SAE -> what its cells are headed with."""

    @property
    def policy(self) -> Policy:
        """What the rows share."""
        return Policy.of(self.rows[0])

    def circumstances(self) -> str:
        """Where and how the numbers were taken, for a title."""
        first = self.rows[0]
        widths = sorted({int(row["d_sae"]) for row in self.rows})
        excluded = first["outliers"] == "excluded"
        # n_tokens are the positions that count, n_outliers those above the threshold, counted or not.
        n_tokens = f"{int(first['n_tokens']) + excluded * int(first['n_outliers']):,}"
        outliers = "outliers kept"
        if excluded:
            threshold = self._per_model("outlier_threshold", lambda text: f"{float(text):g}")
            n_outliers = self._per_model("n_outliers", lambda text: f"{int(text):,}")
            outliers = f"outliers excluded above scaled norm {threshold} ({n_outliers} of {n_tokens} positions)"
        section = "" if first["section"] == "pile" else f"on the {SECTIONS[first['section']]} "
        return (
            f"{section}at {first['hook_name']}, SAE width{'s' * (len(widths) > 1)} {', '.join(map(str, widths))}, "
            f"{outliers}, {first['scale']} scale, {n_tokens} tokens in {int(first['n_sequences']):,} sequences"
            f"{', averaged by batch' * (first['averaging'] == 'batch')}."
        )

    def _per_model(self, column: str, printed: Callable[[str], str]) -> str:
        """A value that belongs to the model, not the SAE: once when both models share it, else each with its model."""
        values = {row["model"]: printed(row[column]) for row in self.rows}
        distinct = set(values.values())
        return distinct.pop() if len(distinct) == 1 else ", ".join(f"{m} {value}" for m, value in values.items())


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Group rows by policy.

    Args:
        rows: Of rows.csv.

    Returns:
        A block a policy, as `policies` orders them.
    """
    labels = sae_labels(rows)
    ordered = sorted(rows, key=post_order)
    return [Block([row for row in ordered if Policy.of(row) == policy], labels) for policy in policies(rows)]


def policies(rows: Iterable[Row]) -> list[Policy]:
    """All that rows have; sections in their order, excluded before kept, matched before raw."""
    order = list(SECTIONS)
    return sorted({Policy.of(row) for row in rows}, key=lambda p: (order.index(p.section), p.outliers, p.scale))


def role(row: Row) -> Role:
    """What an SAE is in the study; its id says so, `base-standard-w1024-l1_5-s0`; one from elsewhere has a name."""
    stem = f"-{row['architecture']}-w{row['d_sae']}-"
    trained_on = row["sae_trained_on"]
    if trained_on == "chat" and row["sae"].startswith(f"control{stem}"):
        return "control"
    for known in ("base", "chat", "finetuned"):
        if trained_on == known and row["sae"].startswith(f"{known}{stem}"):
            return known
    return "external"


def budget(row: Row) -> str:
    """The tokens of a fine-tuned SAE or a control as its id gives them, `5M`; empty for others."""
    return row["sae"].partition(f"-s{row['seed']}-")[2] if role(row) in ("finetuned", "control") else ""


def is_native(row: Row) -> bool:
    """Whether the SAE was trained on the model that it is evaluated on."""
    return row["sae_trained_on"] == row["model"]


def settings(row: Row, *, seed: bool = True) -> tuple[str, ...]:
    """What two SAEs have in common that differ only in what they were trained on (or in the seed too)."""
    keys = ("architecture", "d_sae", "sparsity_key", "sparsity_value", *(("seed",) if seed else ()))
    return tuple(row[key] for key in keys)


def sae_labels(rows: Iterable[Row]) -> dict[str, str]:
    """What to call each SAE: its role when that is unique, else the role and whatever tells it from its siblings.

    Args:
        rows: Of rows.csv.

    Returns:
        SAE -> label, different for every SAE.
    """
    by_sae = {row["sae"]: row for row in rows}
    labels = {sae: sae for sae in by_sae}
    for known, label in SAE_LABELS.items():
        siblings = {sae: traits(row) for sae, row in by_sae.items() if role(row) == known}
        found = telling(siblings)
        if len(set(found.values())) < len(found):
            found = {sae: sae.removeprefix(f"{known}-") for sae in found}
        labels |= {sae: f"{label} ({text})" if text else label for sae, text in found.items()}
    return labels


def telling(traits: Mapping[Key, Sequence[str]]) -> dict[Key, str]:
    """Of everything's traits, given in one order, those that are not the same for all; empty ones are left unsaid."""
    tells = [len(set(values)) > 1 for values in zip(*traits.values(), strict=True)]
    return {key: ", ".join(t for t, says in zip(own, tells, strict=True) if says and t) for key, own in traits.items()}


def traits(row: Row) -> tuple[str, ...]:
    """An SAE's settings in words, the seed and the budget last."""
    tokens = budget(row)
    seed = f"seed {number(row, 'seed'):g}" if row["seed"] else ""
    return row["architecture"], f"w{row['d_sae']}", sparsity(row), seed, f"{tokens} tokens" if tokens else ""


def sparsity(row: Row) -> str:
    """An SAE's sparsity setting, `l1 5`; empty for an SAE that does not record one."""
    if not row["sparsity_key"]:
        return ""
    return f"{row['sparsity_key'].removesuffix('_coefficient')} {number(row, 'sparsity_value'):g}"


def post_order(row: Row) -> tuple[bool, int]:
    """Sorts the rows of one policy as the post has them; SAEs from elsewhere come last."""
    cell = (role(row), row["model"])
    return cell[0] == "external", CELL_ORDER.index(cell) if cell in CELL_ORDER else len(CELL_ORDER)
