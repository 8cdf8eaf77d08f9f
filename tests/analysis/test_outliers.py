"""What kind of token an outlier is."""

import numpy as np

from sae_transfer.analysis.outliers import KINDS, kinds_of

TEXTS = {0: "<s>", 1: "word", 2: "\n", 3: " x\n\n", 4: "¶", 5: "§ 3", 6: "other"}


def named(sequences: list[list[int]], bos: int | None = 0) -> list[list[str]]:
    return [[KINDS[i] for i in row] for row in kinds_of(np.array(sequences), bos, TEXTS)]


def test_a_position_takes_the_first_kind_that_fits() -> None:
    row = [0, 2, 3, 0, 4, 1, 2, 5, 6, 1, 6, 4]
    assert named([row]) == [
        [
            "bos_first",
            "first_newline",
            "newline",
            "bos_later",
            "paragraph",
            "early",
            "newline",
            "paragraph",
            "early",
            "early",
            "other",
            "paragraph",
        ]
    ]


def test_every_row_has_its_own_first_newline() -> None:
    assert named([[0, 1, 2], [0, 3, 2]]) == [
        ["bos_first", "early", "first_newline"],
        ["bos_first", "first_newline", "newline"],
    ]


def test_without_bos_the_first_position_is_other() -> None:
    assert named([[1, 6]], bos=None) == [["other", "early"]]
