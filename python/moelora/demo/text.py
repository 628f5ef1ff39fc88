"""Text of four domains that every Python installation with NumPy carries, cut into byte sequences."""

import csv
import html.entities
import importlib.util
import io
import json
import mimetypes
import random
import re
import unicodedata
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 256  # tokens are bytes
PIECE = 2048  # bytes; the text is dealt to the splits in pieces of this size
DOMAIN_BYTES = 200_000  # every domain is cut to this length, so that none weighs more than another

PYTHON_MODULES = (
    "argparse", "configparser", "csv", "dataclasses", "difflib", "fractions", "functools", "heapq", "inspect",
    "ipaddress", "logging", "pathlib", "shutil", "statistics", "string", "subprocess", "tarfile", "textwrap",
    "threading", "zipfile",
)  # fmt: skip


class Domain(NamedTuple):
    """One domain's bytes: `base` trains the base model, `train` the adapters, `held_out` is never trained on.

    Each is a uint8 array of shape [n_bytes].
    """

    name: str
    base: NDArray[np.uint8]
    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]


def python_source() -> Iterator[str]:
    """Modules of the standard library as they are written."""
    for name in PYTHON_MODULES:
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name) if spec and hasattr(spec.loader, "get_source") else None  # type: ignore[union-attr]
        if source:
            yield source


def english_prose() -> Iterator[str]:
    """Paragraphs of the language reference that `help()` shows; indented code and grammar are left out."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = paragraph.strip("\n").split("\n")
            if len(lines) > 1 and not any(line.startswith(" ") or "::=" in line for line in lines):
                yield re.sub(r"[*`]+", "", " ".join(lines)) + "\n\n"


def c_headers() -> Iterator[str]:
    """The C headers that NumPy ships for extension modules."""
    for path in sorted(Path(np.get_include()).rglob("*.h")):
        yield path.read_text(encoding="utf-8", errors="replace")


def structured_data() -> Iterator[str]:
    """JSON lines and CSV rows made from tables of the standard library."""
    for code in range(0x100, 0x600):
        if name := unicodedata.name(chr(code), ""):
            category, bidirectional = unicodedata.category(chr(code)), unicodedata.bidirectional(chr(code))
            record = {"code": f"U+{code:04X}", "name": name, "category": category, "bidirectional": bidirectional}
            yield json.dumps(record | {"decomposition": unicodedata.decomposition(chr(code)).split()}) + "\n"
    tables = (
        [("entity", "codepoints")] + [(k, " ".join(f"{ord(c):x}" for c in v)) for k, v in html.entities.html5.items()],
        [("status", "phrase", "description")] + [(str(int(s)), s.phrase, s.description) for s in HTTPStatus],
        [("suffix", "type")] + sorted(mimetypes.MimeTypes(()).types_map[True].items()),
    )
    for table in tables:
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows(table)
        yield written.getvalue()


SOURCES = {
    "Python source": python_source,
    "English prose": english_prose,
    "C headers": c_headers,
    "JSON and CSV": structured_data,
}


def load_domains() -> list[Domain]:
    """Read the four domains and deal each one's pieces to the three splits.

    Of every ten pieces one is held out, two train the base and seven train the adapters.

    Returns
    -------
    list of Domain
        In the order of `SOURCES`.

    Raises
    ------
    RuntimeError
        A domain's text is missing or too short on this machine.
    """
    domains = []
    for name, source in SOURCES.items():
        text = "".join(source()).encode()
        # The pieces are shuffled before the cut, so that every file of a domain is in every split.
        pieces = [np.frombuffer(text[i : i + PIECE], np.uint8) for i in range(0, len(text) - PIECE, PIECE)]
        random.Random(0).shuffle(pieces)
        pieces = pieces[: DOMAIN_BYTES // PIECE]
        if len(pieces) < 20:
            raise RuntimeError(f"this Python installation carries only {len(text)} bytes of text for {name!r}")
        base, train, held_out = (
            np.concatenate([piece for i, piece in enumerate(pieces) if i % 10 in tens])
            for tens in ((1, 2), range(3, 10), (0,))
        )
        domains.append(Domain(name, base, train, held_out))
    return domains


def windows(stream: NDArray[np.uint8], starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The windows of `length` bytes that begin at `starts`: [len(starts), length], int64."""
    rows: NDArray[np.int64] = stream[starts[:, None] + np.arange(length)].astype(np.int64)
    return rows
