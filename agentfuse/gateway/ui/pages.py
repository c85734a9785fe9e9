"""Pages: templates, which escape what they are given, under a policy that lets only our own script run."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from agentfuse.config import count, format_size
from agentfuse.gateway.ui import text

BASE = "/ui"
"""The path that all pages are under."""


def _asset(name: str) -> Markup:
    return Markup(resources.files(__package__).joinpath("templates", name).read_text())


def _hash(asset: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(asset.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _asset("page.css"), _asset("page.js")

HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; img-src 'self' data:; "
        "connect-src 'self'; frame-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with less, the browser would not tell our forms' origin either
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""What every page is sent with."""

_TEMPLATES = Environment(
    loader=PackageLoader("agentfuse.gateway.ui"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(
    name=text.name,
    printable=text.printable,
    visible=text.visible,
    lines=text.lines,
    size=format_size,
    count=count,
    time=text.time,
    duration=text.duration,
    share=text.share,
    path=text.path_query,
    basename=os.path.basename,
)
_TEMPLATES.globals.update(style=_STYLE, script=_SCRIPT, base=BASE)


def page(template: str, *, code: int = 200, **values: Any) -> HTMLResponse:
    """A page. All of them want ``key``, of who is signed in, or None."""
    return HTMLResponse(fragment(template, **values), code, HEADERS)


def fragment(template: str, **values: Any) -> str:
    """A part of one."""
    return _TEMPLATES.get_template(template).render(**values)


def problem_page(status: int, message: str) -> HTMLResponse:
    """What went wrong."""
    title = _TITLES.get(status, "Something went wrong")
    return page(
        "problem.html", code=status, title=title, message=message, is_signed_out=status == 401, key=None
    )


_TITLES = {
    303: "Sign in first",
    401: "Not signed in",
    403: "Not allowed",
    404: "Not found",
    405: "Not possible",
    409: "Not possible now",
    413: "Too large",
    502: "The store does not answer",
    507: "No room left",
}
