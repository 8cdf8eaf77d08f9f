"""The one exception for what a user can mend: it is shown as one message, without traceback, exit code 2."""


class StudyError(Exception):
    """A problem in a study, its inputs or its surroundings that its user can mend.

    Args:
        problem: Where it is, what was found there and what was expected.
        remedy: The next thing to try; shown on a line of its own.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem if remedy is None else f"{problem}\n  try: {remedy}")
