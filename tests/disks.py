"""A disk that is full, for real."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def fill(directory: Path) -> Path:
    """Write until nothing more fits; gives the file to remove."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    return filler


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """Nothing fits into a small file system while the block runs."""
    filler = fill(directory)
    try:
        yield
    finally:
        filler.unlink()
