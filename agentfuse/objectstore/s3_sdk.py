"""The SDK at arm's length: the client, how its requests are retried, and what its errors mean.

The only file that imports boto3 and botocore; what they raise ends in :func:`map_botocore`. Importing it
takes about 25 MB and 0.35 s.
"""

from __future__ import annotations

import functools
import random
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Any

import boto3.session
import urllib3.exceptions
from botocore import exceptions as vendor
from botocore.config import Config
from botocore.parsers import ResponseParserError

from agentfuse import __version__
from agentfuse.errors import IntegrityError, StoreError
from agentfuse.objectstore.s3_answers import store_error
from agentfuse.objectstore.s3_url import S3Location

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECTIONS = 16
"""Kept open: for every transfer thread, every part, and whoever asks beside them."""

_DEADLINE = "agentfuse_deadline"  # its name in a request's context
# The SDK would look for the bucket's region itself, for ever where nobody tells it. A URL that names it is
# cheaper.
_ELSEWHERE = ("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "301", "302", "307")
_TRY_AGAIN = ("ConditionalRequestConflict", "OperationAborted", "ConcurrentModification")
BROKEN_OFF = (vendor.HTTPClientError, vendor.IncompleteReadError, urllib3.exceptions.HTTPError)
"""What reading a body raises when the connection breaks."""

RefusedError = vendor.ClientError
"""What a request raises when the store answered, and the answer is no."""

_UNKNOWN = "what it holds is unknown now; try again when it is well"
_REASONS: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    (
        (vendor.NoCredentialsError, vendor.PartialCredentialsError),
        "no credentials found",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
    ),
    (
        (
            vendor.CredentialRetrievalError,
            vendor.MetadataRetrievalError,
            vendor.NoAuthTokenError,
            vendor.ProfileNotFound,
            vendor.SSOError,
            vendor.TokenRetrievalError,
        ),
        "no credentials: {error}",
        "correct the SDK's configuration (AWS_PROFILE, ~/.aws), or log in again",
    ),
    (
        (ResponseParserError, KeyError),
        "the answer is not S3's",
        "correct the endpoint_url in the store's URL",
    ),
    (
        (vendor.SSLError, ssl.SSLError),
        "no TLS connection ({cause})",
        "correct the endpoint_url; for a private CA set AWS_CA_BUNDLE",
    ),
    (
        (vendor.ProxyConnectionError,),
        "the proxy does not answer ({cause})",
        "correct HTTP_PROXY and HTTPS_PROXY, or set NO_PROXY",
    ),
    (
        (socket.gaierror,),
        "the endpoint's name has no address ({cause})",
        "correct the endpoint_url, or the DNS; leave out addressing=virtual, which puts the bucket before it",
    ),
    (
        (ConnectionRefusedError,),
        "the store cannot be reached: connection refused",
        "start it, or correct the endpoint_url in its URL",
    ),
    (
        (vendor.ConnectTimeoutError, vendor.ReadTimeoutError, urllib3.exceptions.TimeoutError),
        "the store does not answer: timed out",
        _UNKNOWN,
    ),
    ((vendor.ConnectionError, *BROKEN_OFF), "the connection broke ({cause})", _UNKNOWN),
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may take. ``read_s`` is for each wait on the network, not for a whole transfer.

    No retry begins ``deadline_s`` after the first attempt, nor after ``attempts`` of them.
    """

    connect_s: float = 5
    read_s: float = 20
    deadline_s: float = 30
    attempts: int = 5


PATIENCE = Patience()


@functools.lru_cache(maxsize=8)
def shared_client(location: S3Location, patience: Patience, pid: int) -> S3Client:
    """A client for all buckets of an endpoint; the location's own and its prefix are to be empty.

    Threads may share it, but not processes (``pid``). Making one takes 0.1 s and 12 MB.
    """
    config = Config(
        signature_version="s3v4",
        connect_timeout=patience.connect_s,
        read_timeout=patience.read_s,
        retries={"mode": "standard", "total_max_attempts": patience.attempts},
        max_pool_connections=CONNECTIONS,
        user_agent_extra=f"agentfuse/{__version__}",
        request_checksum_calculation=location.checksums,
        response_checksum_validation=location.checksums,
        s3={"addressing_style": location.addressing or "auto", "payload_signing_enabled": True},
    )
    client = boto3.session.Session().client(
        "s3", endpoint_url=location.endpoint_url, region_name=location.region, config=config
    )

    def begin(context: dict[str, Any], **_: object) -> None:
        context[_DEADLINE] = time.monotonic() + patience.deadline_s

    client.meta.events.register_first("before-call.s3", begin)
    decide: Any = _within_deadline  # the stubs think that handlers return nothing
    client.meta.events.register_first("needs-retry.s3", decide)
    return client


def _within_deadline(
    *,
    response: tuple[Any, dict[str, Any]] | None,
    caught_exception: Exception | None,
    request_dict: dict[str, Any],
    operation: Any,
    attempts: int,
    **_: object,
) -> float | None:
    """Before the SDK decides on a retry: give up when it is too late, and retry what it would not.

    Returns seconds to wait before a retry, or None to leave it to the SDK.
    """
    parsed = response[1] if response else {}
    failed = caught_exception is not None or (response is not None and response[0].status_code >= 300)
    code = parsed.get("Error", {}).get("Code")
    is_late = time.monotonic() > request_dict["context"][_DEADLINE]
    if failed and (is_late or code in _ELSEWHERE):
        raise caught_exception or RefusedError(parsed, operation.name)  # type: ignore[arg-type]
    if code in _TRY_AGAIN:
        return random.uniform(0, min(0.05 * 2**attempts, 2))
    return None


@contextmanager
def map_botocore(what: str) -> Iterator[None]:
    """Turn what the SDK raises into ``StoreError`` or ``ObjectNotFoundError``; here and nowhere else.

    ``what`` was asked for: an object's or a bucket's address without credentials.
    """
    try:
        yield
    except RefusedError as error:
        said = error.response.get("Error", {})
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
        raise store_error(
            what,
            error.operation_name,
            said.get("Code", ""),
            status=status_of(error),
            said=said.get("Message", ""),
            region=str(headers.get("x-amz-bucket-region") or said.get("Region", "")),
        ) from error
    except vendor.FlexibleChecksumError as error:
        raise IntegrityError(f"{what}: damaged in the store or on the way ({error})") from error
    except (
        vendor.BotoCoreError,
        ResponseParserError,
        urllib3.exceptions.HTTPError,
        ValueError,
        KeyError,  # what every S3 says and this answer does not
    ) as error:
        problem, fix = _unanswered(error)
        raise StoreError(f"{what}: {problem}", hint=fix) from error


def status_of(error: RefusedError) -> int:
    """The HTTP status of an answer; 0 when it had none."""
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0)


def code_of(error: RefusedError) -> str:
    """The store's own word for what is wrong; empty when the answer had none."""
    return error.response.get("Error", {}).get("Code", "")


def time_of(answer: Mapping[str, Any]) -> float:
    """When the store answered, by its own clock; by ours if it does not say."""
    date = parsedate_tz(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
    return mktime_tz(date) if date else time.time()


def was_retried(error: RefusedError) -> bool:
    """Whether an earlier attempt of the same request got no answer, or one that told nothing."""
    return error.response["ResponseMetadata"]["RetryAttempts"] > 0


def _unanswered(error: Exception) -> tuple[str, str]:
    """What kept a request from being answered, and what fixes it."""
    cause = _root_cause(error)
    for kinds, problem, fix in _REASONS:
        if isinstance(cause, kinds) or isinstance(error, kinds):
            return problem.format(error=error, cause=getattr(cause, "strerror", "") or cause), fix
    return str(error), _UNKNOWN


def _root_cause(error: BaseException) -> BaseException:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error
