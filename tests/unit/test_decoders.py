"""Decoders of msgspec are made at import: it learns a type at the type's first use, and two threads that are
the first at the same time crash the process."""

from __future__ import annotations

import re
from pathlib import Path

import agentfuse

_LEARNS = re.compile(r"msgspec\.(?:json|msgpack)\.decode\([^\n]*\btype=(?!self\.)")


def test_no_thread_has_msgspec_learn_a_type() -> None:
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(agentfuse.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if _LEARNS.search(line) or re.match(r"\s+.*msgspec\.(?:json|msgpack)\.Decoder\(", line)
    ]
    assert not found, "make a Decoder at the end of the module instead"
