"""What an ``s3://`` URL says: bucket, prefix, and how to talk to the endpoint. Opens nothing, knows no SDK.

Credentials have no place in it: such a URL is refused, and no message repeats it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, cast, get_args
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from agentfuse.errors import UsageError
from agentfuse.objectstore.base import check_key

Addressing = Literal["path", "virtual"]
Checksums = Literal["when_supported", "when_required"]

FORM = "s3://bucket/prefix?endpoint_url=…&region=…"
_KEYS = ("endpoint_url", "region", "addressing", "checksums")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")
_REGION = re.compile(r"[A-Za-z0-9-]{1,63}")
_SECRETIVE = re.compile(r"key|secret|token|passw|credential|signature", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class S3Location:
    """Where a store lies. ``prefix`` has no slash at either end. ``addressing`` None: as the SDK sees fit.

    ``endpoint_url`` and ``region`` None: as the SDK's own configuration says.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    addressing: Addressing | None = None
    checksums: Checksums = "when_supported"

    @property
    def url(self) -> str:
        """The URL that says this, in one canonical form."""
        said = {key: getattr(self, key) for key in _KEYS}
        if self.checksums == "when_supported":
            del said["checksums"]
        query = urlencode({key: value for key, value in said.items() if value is not None}, safe=":/")
        return f"s3://{self.bucket}/{quote(self.prefix)}".rstrip("/") + (f"?{query}" if query else "")


def parse_s3_url(url: str) -> S3Location:
    """The location in a URL. Raises ``UsageError`` for what is no such URL, or holds credentials."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
        said = dict(query)
        endpoint = urlsplit(said.get("endpoint_url", ""))
        endpoint.port  # noqa: B018  raises what is wrong with it
    except ValueError as error:
        raise UsageError(f"store URL: malformed ({error})", hint=f"write it as {FORM}") from None
    _refuse_credentials(parts, endpoint, said)
    if not _BUCKET.fullmatch(parts.netloc):
        raise _wrong(url, f"{parts.netloc!r} is no bucket's name", f"write it as {FORM}")
    if parts.fragment:
        raise _wrong(url, "has a '#' part", "write '#' in a prefix as %23")
    if len(said) < len(query):
        raise _wrong(url, "says one thing twice", f"give each of {', '.join(_KEYS)} once")
    for key in said:
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, 1)
            meant = f"did you mean {close[0]}?" if close else f"there are: {', '.join(_KEYS)}"
            raise _wrong(url, f"unknown {key!r}", meant)
    prefix = unquote(parts.path).strip("/")
    if prefix:
        check_key(prefix)
    return S3Location(
        bucket=parts.netloc,
        prefix=prefix,
        endpoint_url=_endpoint_url(url, said.get("endpoint_url"), endpoint),
        region=_region(url, said.get("region")),
        # A host that a bucket's name could be put in front of is what only large installations have.
        addressing=cast(
            Addressing | None,
            _choice(url, said, "addressing", get_args(Addressing)) or ("path" if endpoint.netloc else None),
        ),
        checksums=cast(Checksums, _choice(url, said, "checksums", get_args(Checksums)) or "when_supported"),
    )


def _refuse_credentials(parts: SplitResult, endpoint: SplitResult, said: dict[str, str]) -> None:
    if "@" in parts.netloc or "@" in endpoint.netloc or any(_SECRETIVE.search(key) for key in said):
        raise UsageError(
            "store URL: holds credentials, which would end up in logs, records and process lists",
            hint="give them to the SDK: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
        )


def _endpoint_url(url: str, value: str | None, parts: SplitResult) -> str | None:
    if value is None:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise _wrong(
            url, f"endpoint_url {value!r} is no address", "write it like https://s3.example.com:9000"
        )
    return value.rstrip("/")


def _region(url: str, value: str | None) -> str | None:
    if value is not None and not _REGION.fullmatch(value):
        raise _wrong(url, f"region {value!r} is no region's name", "write it like eu-central-1")
    return value


def _choice(url: str, said: dict[str, str], key: str, choices: tuple[str, ...]) -> str | None:
    value = said.get(key)
    if value is not None and value not in choices:
        raise _wrong(url, f"{key} {value!r}", f"there are: {', '.join(choices)}")
    return value


def _wrong(url: str, problem: str, fix: str) -> UsageError:
    return UsageError(f"store {url!r}: {problem}", hint=fix)
