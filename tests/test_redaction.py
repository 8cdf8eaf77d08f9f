import logging

import pytest

from sae_transfer import cli
from sae_transfer.redaction import Redaction, redacted


def test_secrets_of_the_environment_are_replaced_by_their_names() -> None:
    environment = {"HF_TOKEN": "hf_abcdefgh123", "WANDB_API_KEY": "0123456789abcdef", "HOME": "/home/someone"}
    text = "with hf_abcdefgh123 and 0123456789abcdef in /home/someone"
    assert redacted(text, environment) == "with <HF_TOKEN> and <WANDB_API_KEY> in /home/someone"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY"])
def test_innocent_variables_are_left(name: str) -> None:
    assert redacted("a long value stays", {name: "long value"}) == "a long value stays"


@pytest.mark.parametrize("credentials", ["me:secret", "me:p@ss", "me:a/b"])
def test_credentials_in_urls_are_dropped(credentials: str) -> None:
    assert redacted(f"clone https://{credentials}@host/repo.git now", {}) == "clone https://host/repo.git now"


@pytest.mark.parametrize("name", ["PGPASSWORD", "GITHUB_PAT", "DB_PASS", "APIKEY", "MY_SECRET_1"])
def test_other_names_of_secrets_are_known(name: str) -> None:
    assert redacted("with hush-hush-hush", {name: "hush-hush-hush"}) == f"with <{name}>"


def test_log_records_are_redacted_with_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "very-secret-value")
    record = logging.LogRecord("a", logging.INFO, "", 1, "downloading with %s", ("very-secret-value",), None)
    assert Redaction().filter(record)
    assert record.getMessage() == "downloading with <MY_TOKEN>"


def test_what_is_said_of_a_bug_is_redacted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh123")

    def fail(**_: object) -> None:
        raise RuntimeError("https://me:pass@host/repo.git refused hf_abcdefgh123")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.startswith("Traceback") and said.endswith("RuntimeError: https://host/repo.git refused <HF_TOKEN>\n")
