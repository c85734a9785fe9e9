"""Takes what could be a credential out of a text that goes to a log or a terminal.

The last line of defence: nobody puts one there on purpose, but errors of libraries quote URLs and headers.
"""

from __future__ import annotations

import re

_MASK = "***"
_USERINFO = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s"'<>]*@""")
_SECRETIVE = r"signature|credential|secret|passw(?:or)?d|token|api[-_]?key|access[-_]?key(?:[-_]?id)?"
_PARAMETER = re.compile(rf"""\b((?:[\w-]*(?:{_SECRETIVE})|sig)=)[^&;,\s"'<>)]+""", re.IGNORECASE)
_FIELD = re.compile(rf"""(["'][\w-]*(?:{_SECRETIVE})["']\s*:\s*["'])[^"']+""", re.IGNORECASE)
_HEADER = re.compile(
    r"""\b((?:proxy-)?authorization|(?:set-)?cookie|x-amz-security-token)(["']?\s*[:=]\s*b?["']?)[^"'\r\n}]+""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_KEYS = re.compile(r"\b(AKIA|ASIA|whsec_)[A-Za-z0-9+/=]{12,}")


def redact(text: str) -> str:
    """The text with ``***`` for passwords and signatures in URLs, for secretive parameters and headers."""
    text = _USERINFO.sub(rf"\1{_MASK}@", text)
    text = _HEADER.sub(rf"\1\2{_MASK}", text)
    text = _PARAMETER.sub(rf"\1{_MASK}", text)
    text = _FIELD.sub(rf"\1{_MASK}", text)
    text = _BEARER.sub(rf"\1 {_MASK}", text)
    return _KEYS.sub(rf"\1{_MASK}", text)
