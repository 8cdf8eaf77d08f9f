"""Where a test of what runs on either runs: on the CPU always, on a GPU when it is asked for (`-m gpu`)."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
