"""The one exception for what a user can mend: it is shown as one message, without traceback, exit code 2."""

OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "CUDA error: out of memory",  # CUDA outside of torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "resource allocation failed when calling `cusparse",
    "insufficient resources when calling `cusparse",
)


class StudyError(Exception):
    """A problem in a study, its inputs or its surroundings that its user can mend.

    Args:
        problem: Where it is, what was found there and what was expected.
        remedy: The next thing to try; shown on a line of its own.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem if remedy is None else f"{problem}\n  try: {remedy}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of its GPU did not suffice; torch has an own exception for the GPU only."""
    named = {kind.__name__ for kind in type(error).__mro__}  # by name: this module does not import torch
    if {"MemoryError", "OutOfMemoryError"} & named:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
