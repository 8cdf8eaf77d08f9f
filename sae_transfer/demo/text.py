"""The demo's text: documentation and source of the Python that runs it.

Every machine that can run this package has this text, so the demo needs no network and ships no corpus. A document is
one long docstring, one topic of `pydoc`, or a piece of a module's source (with the docstrings that stand alone taken
out, so that no sentence is there twice). Which side of the split a document is on depends on a hash of its module's
name and on nothing else: a file that is missing, or new in another Python, moves no other one. The topics quote one
another at length, so all of them are training text.
"""

import ast
import functools
import hashlib
import importlib
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.25
"""Share of module names that pretraining and fine-tuning never see."""

MAX_DOCUMENT_CHARS = 4000
MIN_PROSE_CHARS = 200
"""A docstring shorter than this stays in the source."""

MIN_ANSWER_CHARS = 20
MAX_ANSWER_CHARS = 110
MAX_QUESTION_CHARS = 90

# Absent from some installations (Debian packages them separately, 3.12 and 3.13 dropped some), or made at build time.
_SKIPPED = frozenset(
    "test tests idle_test idlelib turtledemo tkinter lib2to3 distutils _distutils_system_mod ensurepip encodings "
    "pydoc_data sitecustomize usercustomize".split()
)

_QUESTIONS = {
    "function": (
        "What does {name} do?",
        "Explain {name}.",
        "Describe the function {name}.",
        "When should I call {name}?",
    ),
    "class": ("What is {name}?", "Explain the class {name}.", "Describe {name}.", "When would I use {name}?"),
    "module": (
        "What is the {name} module for?",
        "Explain the module {name}.",
        "Tell me about {name}.",
        "What does {name} provide?",
    ),
}

_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class QuestionPair(NamedTuple):
    """A question about a name of the standard library, and the first sentence of its docstring."""

    question: str
    answer: str


class _Docstring(NamedTuple):
    """One docstring: qualified name, kind of what it documents, cleaned text, its lines in the source (from 1)."""

    name: str
    kind: str
    text: str
    first_line: int
    last_line: int


def pretraining_documents() -> list[str]:
    """Text that the demo's models are trained on.

    Returns:
        Documents of at most `MAX_DOCUMENT_CHARS` characters, code and prose mixed, in an order that is a hash of their
        names: the same on every file system, for the same Python.
    """
    return _documents(held_out=False)


def study_documents() -> list[str]:
    """The dataset `demo:text`: documents of modules that the demo's models were not trained on.

    Returns:
        Documents like those of `pretraining_documents`, and none of them.
    """
    return _documents(held_out=True)


def question_pairs(*, held_out: bool) -> list[QuestionPair]:
    """Instruction data made from docstrings, on the same split of modules as the documents.

    Args:
        held_out: Which side of the split: False for fine-tuning the chat model, True for testing it.

    Returns:
        Pairs without a repeated question, in an order that is a hash of the question.
    """
    pairs: dict[str, str] = {}
    for module, path in _modules():
        if is_held_out(module) != held_out:
            continue
        for doc in _docstrings(module, _read(path)):
            answer = _first_sentence(doc.text)
            if any(part.startswith("_") for part in doc.name.split(".")) or answer is None:
                continue
            wordings = _QUESTIONS[doc.kind]
            question = wordings[_hash(doc.name) % len(wordings)].format(name=doc.name)
            if len(question) <= MAX_QUESTION_CHARS:
                pairs.setdefault(question, answer)
    return [QuestionPair(question, pairs[question]) for question in sorted(pairs, key=_hash)]


def study_instructions() -> list[dict[str, str]]:
    """The dataset `demo:instructions`: held-out questions in the columns of alpaca.

    Returns:
        Rows of `instruction`, `input` (always empty) and `output`, without a repeated instruction.
    """
    return [{"instruction": q, "input": "", "output": a} for q, a in question_pairs(held_out=True)]


def is_held_out(module: str) -> bool:
    """Whether a module is kept from training.

    Args:
        module: Its dotted name. `_pydatetime` counts as `datetime`, which it was called until Python 3.11.
    """
    return _hash(re.sub(r"^_(py)?", "", module)) < HELD_OUT_SHARE * 2**64


def _documents(*, held_out: bool) -> list[str]:
    named = dict[str, str]()
    for module, path in _modules():
        if is_held_out(module) != held_out:
            continue
        source = _read(path)
        kept = dict(enumerate(source.split("\n"), start=1))
        for doc in _docstrings(module, source):
            if len(doc.text) < MIN_PROSE_CHARS:
                continue
            for part, text in enumerate(_pieces(f"{doc.name}\n\n{doc.text}\n")):
                named[f"doc {doc.name} {part}"] = text
            for number in range(doc.first_line, doc.last_line + 1):
                kept.pop(number, None)
        for part, text in enumerate(_pieces("\n".join(kept.values()))):
            named[f"source {module} {part}"] = text
    if not held_out:
        for topic, topic_text in _topics():
            for part, text in enumerate(_pieces(topic_text)):
                named[f"topic {topic} {part}"] = text
    return [named[name] for name in sorted(named, key=_hash)]


def _modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the standard library that every installation has, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = dict[str, Path]()
    for directory, below, files in os.walk(root):
        # No package's name has a hyphen: site-packages and build directories go, __pycache__ holds no source.
        below[:] = [name for name in below if name.isidentifier() and name not in _SKIPPED]
        package = Path(directory).relative_to(root).parts
        for file in files:
            name, _, suffix = file.rpartition(".")
            if suffix == "py" and name.isidentifier() and name not in _SKIPPED and "_sysconfigdata" not in name:
                parts = package if name == "__init__" else (*package, name)
                found[".".join(parts)] = Path(directory, file)
    yield from sorted(found.items())


def _read(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _topics() -> list[tuple[str, str]]:
    """Titles and texts of `pydoc`'s language reference, each text once; none where an installation left it out."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    by_text = {text: topic for topic, text in sorted(topics.items(), reverse=True)}
    return sorted((topic, text) for text, topic in by_text.items())


@functools.cache
def _docstrings(module: str, source: str) -> tuple[_Docstring, ...]:
    """All docstrings of a module's source that fill whole lines, in order."""
    found: list[_Docstring] = []
    lines = source.split("\n")  # str.splitlines would also cut at the form feeds that some modules have

    def visit(node: _Documented, name: str, kind: str) -> None:
        text = ast.get_docstring(node)
        if text:
            place = node.body[0]
            if lines[place.lineno - 1].lstrip()[:1] in tuple("\"'rRuU"):
                found.append(_Docstring(name, kind, text, place.lineno, place.end_lineno or place.lineno))
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                visit(child, f"{name}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}", "function")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        visit(ast.parse(source), module, "module")
    return tuple(found)


def _first_sentence(text: str) -> str | None:
    """First sentence of a docstring on one line, or None where it does not make an answer."""
    sentence = " ".join(text.split("\n\n")[0].split())
    if end := _SENTENCE_END.search(sentence):
        sentence = sentence[: end.end()]
    if not sentence.endswith((".", "!", "?")):
        sentence = f"{sentence.rstrip(':;,')}."
    is_prose = sentence[:1].isupper() and " " in sentence and ">>>" not in sentence and "->" not in sentence
    return sentence if is_prose and MIN_ANSWER_CHARS <= len(sentence) <= MAX_ANSWER_CHARS else None


def _pieces(text: str) -> Iterator[str]:
    """Text in pieces of at most `MAX_DOCUMENT_CHARS` characters of about the same length, cut between lines."""
    text = re.sub(r"\n{4,}", "\n\n\n", text.strip("\n"))
    if not text.strip():
        return
    target = len(text) / -(-len(text) // MAX_DOCUMENT_CHARS)
    piece = ""
    for line in text.split("\n"):
        line = f"{line}\n"
        if piece and (len(piece) + len(line) > MAX_DOCUMENT_CHARS or len(piece) >= target):
            yield piece
            piece = ""
        piece += line
    yield piece


def _hash(text: str) -> int:
    """A number from 0 to 2**64 - 1 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
