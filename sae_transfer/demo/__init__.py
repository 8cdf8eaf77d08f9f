"""The embedded pair: two tiny trained models, text to study them on, and how they were made.

`model_dir` gives the checkpoints, `text` the data sets `demo:text` and `demo:instructions`, and
`python -m sae_transfer.demo.make_pair OUT_DIR` makes the pair again.
"""

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
STUDY = PACKAGE_DIR / "demo.yaml"
SIDES = ("base", "chat")


def model_dir(side: str) -> Path:
    """Directory of one embedded model, in Hugging Face form.

    Args:
        side: `base` or `chat`.

    Returns:
        The directory inside the installed package.

    Raises:
        ValueError: The pair has no such side.
    """
    if side not in SIDES:
        raise ValueError(f"the demo pair has the sides {' and '.join(SIDES)}, not {side!r}")
    return PACKAGE_DIR / side
