"""The object store that is a bucket, or a prefix in one, of S3 or of what speaks its language.

Keeps the contract upon the SDK's requests, of which :mod:`agentfuse.objectstore.s3_sdk` knows how they
are made, retried and fail. Import it only when such a store is opened: that loads the SDK.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote

from agentfuse.errors import ObjectNotFoundError, StoreError
from agentfuse.objectstore.base import CHUNK_BYTES, ObjectStat, Source, check_key, require_presignable
from agentfuse.objectstore.parts import PartSender, read_whole, require_end
from agentfuse.objectstore.s3_sdk import (
    BROKEN_OFF,
    PATIENCE,
    Patience,
    RefusedError,
    code_of,
    map_botocore,
    shared_client,
    status_of,
    time_of,
    was_retried,
)
from agentfuse.objectstore.s3_url import S3Location

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef

PART_BYTES = 8 * 1024 * 1024
"""Sources longer than this travel in parts; shorter ones in one request, which is all or nothing."""

MAX_PARTS = 10_000  # of one object, by the protocol

PARTS_AT_A_TIME = 4
"""Parts of all uploads of a store that are in memory at a time."""


class S3Store:
    """An object store in an existing bucket. See ``ObjectStore`` for the contract.

    Credentials come from boto3's chain. What is sent is signed with its SHA-256, so that a store refuses
    what arrived damaged; unless ``checksums=when_required`` it also keeps the hash with the object.
    Raises ``StoreError`` when the SDK's own configuration is broken.
    """

    def __init__(self, location: S3Location, patience: Patience = PATIENCE) -> None:
        self._location = location
        self._root = location.prefix + "/" if location.prefix else ""
        self._sends_checksums = location.checksums == "when_supported"
        self._patience = patience
        self._parts = PartSender(PARTS_AT_A_TIME)
        with map_botocore(f"s3://{location.bucket}"):
            self._client = shared_client(replace(location, bucket="", prefix=""), patience, os.getpid())

    @property
    def url(self) -> str:
        """``s3://…`` in one canonical form."""
        return self._location.url

    def put(self, key: str, body: bytes | bytearray | Source, *, size_bytes: int | None = None) -> None:
        """Write an object. A source of more than ``PART_BYTES`` travels in parts, some at a time."""
        if isinstance(body, (bytes, bytearray)):
            self._put_whole(key, body)
            return
        if size_bytes is None:
            raise TypeError("size_bytes is required for a source")
        if size_bytes > PART_BYTES:
            self._put_in_parts(key, body, size_bytes)
            return
        if size_bytes == 0:
            require_end(body, size_bytes)
            self._put_whole(key, b"")
            return
        with read_whole(body, size_bytes) as content:
            self._put_whole(key, content)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write an object unless there is one, in one request; whether this call wrote it.

        When an answer was lost and the retry says "there is one", it is read and compared: equal bytes
        are this call's own. So writers must differ in their bytes, as the contract has it.
        """
        where = self._where(key)
        with map_botocore(self._shown(key)):
            try:
                self._client.put_object(**where, Body=body, IfNoneMatch="*", **self._checksum(body))
            except RefusedError as refused:
                if status_of(refused) != HTTPStatus.PRECONDITION_FAILED:
                    raise
                was_ambiguous = was_retried(refused)
            else:
                return True
        return was_ambiguous and self._holds(key, body)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object or of a range of it."""
        return b"".join(self._read(key, offset, length, piece_bytes=None))

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same in pieces. A connection that breaks is replaced, going on where it broke."""
        return self._read(key, offset, length, piece_bytes=CHUNK_BYTES)

    def stat(self, key: str) -> ObjectStat:
        """Size and age of an object, by reading its first byte.

        A HEAD would be answered without a body: 404 for a missing bucket, too, and 403 for anything.
        """
        where = self._where(key)
        with map_botocore(self._shown(key)):
            if found := self._open(where, 0, 1):
                with closing(found["Body"]) as body:
                    body.read()
                size_bytes = int(found["ContentRange"].rpartition("/")[2])
                return ObjectStat(key, size_bytes, found["LastModified"].timestamp())
            empty = self._client.head_object(**where)
            return ObjectStat(key, empty["ContentLength"], empty["LastModified"].timestamp())

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """The objects under a prefix, in key order; one request for each 1,000 drawn."""
        position: dict[str, Any] = {"StartAfter": self._root + start_after} if start_after else {}
        while True:
            with map_botocore(self._shown(prefix)):
                page = self._client.list_objects_v2(
                    Bucket=self._location.bucket, Prefix=self._root + prefix, **position
                )
                is_last = not page["IsTruncated"]
                position = {} if is_last else {"ContinuationToken": page["NextContinuationToken"]}
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # a console's idea of a directory
                    key = found["Key"].removeprefix(self._root)
                    yield ObjectStat(key, found["Size"], found["LastModified"].timestamp())
            if is_last:
                return

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        where = self._where(key)
        with suppress(ObjectNotFoundError), map_botocore(self._shown(key)):
            self._client.delete_object(**where)

    def forget(self, key: str) -> None:
        """Nothing is kept but the objects."""

    def remove_leftovers(self, prefix: str, grace_s: float, *, dry_run: bool = False) -> int:
        """End multipart uploads that a killed process began; by the store's clock."""
        count = 0
        with map_botocore(self._shown(prefix)):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._location.bucket, Prefix=self._root + prefix
            )
            for page in pages:
                before = time_of(page) - grace_s
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < before:
                        if not dry_run:
                            self._abort(upload["Key"], upload["UploadId"])
                        count += 1
        return count

    def presign(self, key: str, ttl_s: int, *, media_type: str = "", file_name: bytes = b"") -> str:
        """A URL by which anybody may read the object for ``ttl_s`` seconds."""
        require_presignable(key, ttl_s)
        asked = self._where(key)
        if media_type:
            asked["ResponseContentType"] = media_type
        if file_name:
            asked["ResponseContentDisposition"] = f"attachment; filename*=UTF-8''{quote(file_name, safe='')}"
        with map_botocore(self._shown(key)):
            return self._client.generate_presigned_url("get_object", Params=asked, ExpiresIn=ttl_s)

    # -- requests

    def _where(self, key: str) -> dict[str, Any]:
        check_key(key)
        return {"Bucket": self._location.bucket, "Key": check_key(self._root + key)}

    def _shown(self, key: str) -> str:
        return f"s3://{self._location.bucket}/{self._root}{key}"

    def _checksum(self, body: bytes | bytearray | mmap.mmap) -> dict[str, Any]:
        if not self._sends_checksums:
            return {}
        return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode()}

    def _put_whole(self, key: str, body: bytes | bytearray | mmap.mmap) -> None:
        where = self._where(key)
        with map_botocore(self._shown(key)):
            self._client.put_object(**where, Body=cast(bytes, body), **self._checksum(body))

    def _holds(self, key: str, body: bytes) -> bool:
        try:
            return self.get(key) == body
        except ObjectNotFoundError:
            return False

    def _read(self, key: str, offset: int, length: int | None, piece_bytes: int | None) -> Iterator[bytes]:
        if length == 0:
            self.stat(key)
            return
        where = self._where(key)
        done, failures, version = 0, 0, None
        with map_botocore(self._shown(key)):
            while found := self._open(where, offset + done, None if length is None else length - done):
                if version not in (None, is_of := (found.get("ETag"), found["LastModified"])):
                    raise StoreError(f"{self._shown(key)}: replaced while it was read", hint="read it again")
                version = is_of
                try:
                    with closing(found["Body"]) as body:
                        while piece := body.read(piece_bytes):
                            done, failures = done + len(piece), 0
                            yield piece
                except BROKEN_OFF:
                    failures += 1
                    if failures >= self._patience.attempts:
                        raise
                else:
                    return

    def _open(self, where: dict[str, Any], offset: int, length: int | None) -> GetObjectOutputTypeDef | None:
        """An object from an offset on; None when it ends before."""
        if offset == 0 and length is None:
            return self._client.get_object(**where)
        last = "" if length is None else offset + length - 1
        if length == 0:
            return None
        try:
            return self._client.get_object(**where, Range=f"bytes={offset}-{last}")
        except RefusedError as error:
            if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None
            raise

    # -- multipart uploads

    def _put_in_parts(self, key: str, body: Source, size_bytes: int) -> None:
        where = self._where(key)
        kept: dict[str, Any] = {"ChecksumAlgorithm": "SHA256"} if self._sends_checksums else {}
        with map_botocore(self._shown(key)):
            upload = self._client.create_multipart_upload(**where, **kept)["UploadId"]
        try:
            parts = self._parts.send(
                body,
                size_bytes,
                max(PART_BYTES, -(-size_bytes // MAX_PARTS)),
                functools.partial(self._send_part, key, upload),
            )
            self._complete(key, upload, parts, size_bytes)
        except BaseException:
            with suppress(StoreError):  # then remove_leftovers() will
                self._abort(where["Key"], upload)
            raise

    def _send_part(self, key: str, upload: str, number: int, part: mmap.mmap) -> CompletedPartTypeDef:
        checksum = self._checksum(part)
        with map_botocore(self._shown(key)):
            sent = self._client.upload_part(
                **self._where(key), UploadId=upload, PartNumber=number, Body=cast(IO[bytes], part), **checksum
            )
        return {"PartNumber": number, "ETag": sent["ETag"], **checksum}  # type: ignore[typeddict-item]

    def _complete(
        self, key: str, upload: str, parts: Sequence[CompletedPartTypeDef], size_bytes: int
    ) -> None:
        where = self._where(key)
        with map_botocore(self._shown(key)):
            try:
                self._client.complete_multipart_upload(
                    **where, UploadId=upload, MultipartUpload={"Parts": parts}
                )
            except RefusedError as error:
                # Completed by an attempt whose answer was lost: then the object is what the parts make.
                if code_of(error) != "NoSuchUpload" or not self._is_made_of(where, parts, size_bytes):
                    raise

    def _is_made_of(
        self, where: dict[str, Any], parts: Sequence[CompletedPartTypeDef], size_bytes: int
    ) -> bool:
        try:
            found = self._client.head_object(**where)
        except RefusedError:
            return False
        return (found["ContentLength"], found["ETag"].strip('"')) == (size_bytes, _etag_of(parts))

    def _abort(self, full_key: str, upload: str) -> None:
        with map_botocore(f"s3://{self._location.bucket}/{full_key}"):
            try:
                self._client.abort_multipart_upload(
                    Bucket=self._location.bucket, Key=full_key, UploadId=upload
                )
            except RefusedError as error:
                if code_of(error) != "NoSuchUpload":  # ended by itself meanwhile
                    raise


def _etag_of(parts: Sequence[CompletedPartTypeDef]) -> str:
    """The ETag of an object made of parts, where ETags are MD5 sums; elsewhere nothing that matches."""
    with suppress(ValueError):
        digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
    return ""
