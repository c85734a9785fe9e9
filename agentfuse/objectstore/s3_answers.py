"""What an S3 store's error codes mean, and what fixes each. Knows the protocol's words, not the SDK's.

Codes come from the S3 API reference, and from what radosgw, MinIO and ministack say in its place.
"""

from __future__ import annotations

from agentfuse.errors import ObjectNotFoundError, StoreError

_DENIED = (
    "access denied",
    "these credentials need s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:AbortMultipartUpload on the bucket and on all keys under the prefix; for gc also "
    "s3:ListBucketMultipartUploads",
)
_NO_BUCKET = (
    "there is no such bucket",
    "create it, or correct the bucket, the region or the endpoint_url in the store's URL",
)
_OTHER_REGION = (
    "the bucket is in another region than the requests were signed for",
    "put the bucket's own region into the store's URL: ?region=…",
)
_WRONG_KEY = (
    "the store does not know this access key",
    "correct AWS_ACCESS_KEY_ID or the profile; is the endpoint_url the one these credentials are for?",
)
_EXPIRED = ("the credentials have expired", "renew the session token, or log in again")
_CLOCK = (
    "this host's clock and the store's differ by too much",
    "set this host's clock (timedatectl set-ntp true), then try again",
)
_OVERLOADED = ("the store is overloaded or failing", "try again when it is well")
_DAMAGED = (
    "the bytes arrived damaged, so the store refused them",
    "try again; if it stays so, look for a proxy or a network card that changes data",
)
_NO_ROOM = ("the store has no room", "free some space there or raise its quota, then try again")
_MISSING_FEATURE = (
    "the store cannot do what was asked",
    "try ?checksums=when_required in its URL; if that does not help, choose another store",
)

_MEANINGS = {
    "NoSuchBucket": _NO_BUCKET,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "Forbidden": _DENIED,
    "InvalidAccessKeyId": _WRONG_KEY,
    "SignatureDoesNotMatch": (
        "the signature is wrong",
        "correct AWS_SECRET_ACCESS_KEY or the profile; a proxy on the way must not change requests",
    ),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": ("the session token is not valid", "correct AWS_SESSION_TOKEN, or unset it"),
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "PermanentRedirect": _OTHER_REGION,
    "TemporaryRedirect": _OTHER_REGION,
    "IllegalLocationConstraintException": _OTHER_REGION,
    "301": _OTHER_REGION,
    "302": _OTHER_REGION,
    "307": _OTHER_REGION,
    "SlowDown": _OVERLOADED,
    "ServiceUnavailable": _OVERLOADED,
    "InternalError": _OVERLOADED,
    "RequestTimeout": _OVERLOADED,
    "500": _OVERLOADED,
    "502": _OVERLOADED,
    "503": _OVERLOADED,
    "504": _OVERLOADED,
    "BadDigest": _DAMAGED,
    "InvalidDigest": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "QuotaExceeded": _NO_ROOM,
    "InsufficientCapacity": _NO_ROOM,
    "XMinioStorageFull": _NO_ROOM,
    "507": _NO_ROOM,
    "NotImplemented": _MISSING_FEATURE,
    "501": _MISSING_FEATURE,
    "InvalidBucketName": ("that is no bucket's name", "correct the bucket in the store's URL"),
}
_UNKNOWN = ("the store refused", "what it holds is unknown now; try again when it is well")


def store_error(what: str, operation: str, code: str, *, status: int, said: str, region: str) -> StoreError:
    """The error to raise for an answer: ``code`` and ``said`` as the store put it, empty when it did not.

    ``what``: the object asked for. ``operation``: the API's name of the request. ``region``: the
    bucket's, if the answer told it. ``ObjectNotFoundError`` only for an answer that names the object as
    absent: a bare 404 may come from a missing bucket, or from what is no S3 store at all.
    """
    if code == "NoSuchKey":
        return ObjectNotFoundError(f"{what}: the store has none")
    meaning, fix = _MEANINGS.get(code) or _MEANINGS.get(str(status)) or _UNKNOWN
    if region and meaning == _OTHER_REGION[0]:
        fix = f"put the bucket's own region into the store's URL: ?region={region}"
    answer = " ".join(filter(None, [str(status) if status else "", "" if code == str(status) else code]))
    # What the store says in words is dropped where ours say the same and its own may name identities.
    words = f", {said}" if said and meaning == _UNKNOWN[0] else ""
    return StoreError(f"{operation} {what}: {meaning} ({answer}{words})", hint=fix)
