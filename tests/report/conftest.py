from pathlib import Path

import pytest

from sae_transfer.report.page import write_report
from tests.report.runs import full_run


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage done, and its report; made once, so not to be changed."""
    run = full_run(tmp_path_factory.mktemp("reported"))
    write_report(run)
    return run
