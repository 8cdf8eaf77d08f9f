"""What all tests share: no network, one thread, and a small random pair on disk."""

import contextlib
import gc
import os
import signal
import subprocess
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# sae_lens asks for a GPU when it is imported; asked in the other way, CUDA could not be used in forks
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from pathlib import Path

import pytest
import torch

from sae_transfer import signals
from tests.checkpoints import make_chat_of, make_checkpoint, words_of

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: the stages ask for one after each model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nobody_asks_to_stop() -> Iterator[None]:
    """A test that asks to stop asks no later one, nor leaves this process deaf."""
    before = {number: signal.getsignal(number) for number in (*signals.STOPPING, signal.SIGALRM)}
    yield
    with signals.installed():
        pass
    for number, handler in before.items():
        signal.signal(number, handler)


REAL_GPU = pytest.param("real GPU", marks=pytest.mark.gpu)


@pytest.fixture(params=["pretended GPU", REAL_GPU])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """A GPU: that of `tests/pretended_gpu.py`, and a real one when it is asked for (`-m gpu`)."""
    yield from _device(request.param)


@pytest.fixture(params=["CPU", "pretended GPU", REAL_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test of what runs on either runs."""
    yield from _device(request.param)


def _device(name: str) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if name == "pretended GPU":
            from tests.pretended_gpu import pretended_gpu

            stack.enter_context(pretended_gpu())
        yield "cpu" if name == "CPU" else "cuda"


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama and a slightly moved copy of it, as base and chat."""
    root = tmp_path_factory.mktemp("pair")
    base = make_checkpoint(root / "base", "llama")
    return base, make_chat_of(base, root / "chat")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 12,000 tokens of text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words_of(3, 9000))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)
