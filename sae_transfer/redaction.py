"""Keep secrets out of what is written: tokens of the environment, and credentials in URLs."""

import logging
import os
import re
from collections.abc import Mapping

# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, PGPASSWORD; not TOKENIZERS_PARALLELISM
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|KEY|SECRET|PAT|PASS|CREDENTIALS?)(_|$)|(TOKEN|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)$",
    re.IGNORECASE,
)
_URL_CREDENTIALS = re.compile(r"://[^\s\"']*@")  # up to the last @, since a password may hold one
_SHORTEST_SECRET = 8  # characters; shorter values would be found in innocent words


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without `user:password@` in its URLs, and with the name of an environment variable for its secret value.

    Args:
        text: Anything that is about to be written.
        environment: Where secrets come from.
    """
    text = _URL_CREDENTIALS.sub("://", text)
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, f"<{name}>")
    return text


class Redaction(logging.Filter):
    """Redacts the message of every record that a handler writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; it always passes."""
        record.msg, record.args = redacted(record.getMessage()), None
        return True
