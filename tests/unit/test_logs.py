"""Log lines: what a terminal, journald and everything else get, one line a fact, and nobody's credentials."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agentfuse import logs
from agentfuse.errors import UsageError
from agentfuse.logs import LogFormat, Whose, log_to_file, log_to_stream, set_level
from agentfuse.redaction import redact

WHOSE = Whose("writer", "run-1", "/home/agent")
log = logging.getLogger("agentfuse.sync.background")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("agentfuse")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    ours.setLevel(logging.NOTSET)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def logged(form: LogFormat, environ: Mapping[str, str] | None = None) -> io.StringIO:
    stream = io.StringIO()
    log_to_stream(stream, form, WHOSE, environ or {})
    return stream


def fail() -> None:
    try:
        int("first\nsecond https://u:hunter2@host/")
    except ValueError:
        log.exception("unexpected error")


def test_a_line_for_people_says_whose_it_is() -> None:
    stream = logged("text")
    log.warning("%s is not synced", "shared/")
    assert stream.getvalue()[8:] == " WARNING [writer/run-1] sync.background: shared/ is not synced\n"


def test_journald_gets_priorities() -> None:
    stream = logged("journald")
    log.error("bad")
    log.warning("not good")
    log.info("good")
    log.debug("untold")
    assert stream.getvalue().splitlines() == [
        "<3>[writer/run-1] sync.background: bad",
        "<4>[writer/run-1] sync.background: not good",
        "<6>[writer/run-1] sync.background: good",
    ]


def test_every_line_of_a_traceback_has_its_priority() -> None:
    stream = logged("journald")
    fail()
    lines = stream.getvalue().splitlines()
    assert len(lines) > 4
    assert all(line.startswith("<3>") for line in lines)


def test_json_is_one_line_even_of_a_traceback() -> None:
    stream = logged("json")
    fail()
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert {name: found[name] for name in ("level", "message", "agent", "execution", "mount")} == {
        "level": "ERROR",
        "message": "unexpected error",
        "agent": "writer",
        "execution": "run-1",
        "mount": "/home/agent",
    }
    assert found["time"].endswith("Z")
    assert "Traceback" in found["traceback"]
    assert "hunter2" not in line


@pytest.mark.parametrize("form", ["text", "journald", "json"])
def test_a_name_cannot_pass_for_a_line_of_its_own(form: LogFormat) -> None:
    stream = logged(form)
    log.warning("%s cannot be merged", "a\n<3>[writer/run-1] forged\x1b[2J\udcff")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    stream.getvalue().encode()


def test_a_stream_that_is_neither_terminal_nor_journal_gets_json() -> None:
    stream = logged("auto", {"JOURNAL_STREAM": "1:2"})
    log.warning("a fact")
    assert json.loads(stream.getvalue())["message"] == "a fact"


def test_journald_is_known_by_the_stream_that_systemd_names() -> None:
    reader, writer = os.pipe()
    found = os.fstat(writer)
    program = (
        "import logging, os, sys; from agentfuse.logs import *\n"
        "log_to_stream(sys.stderr, 'auto', Whose('a', 'e', '/m'), os.environ)\n"
        "logging.getLogger('agentfuse.x').warning('told')\n"
    )
    environ = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    subprocess.run([sys.executable, "-c", program], stderr=writer, env=environ, check=True)
    os.close(writer)
    with open(reader, encoding="utf-8") as journal:
        assert journal.read() == "<4>[a/e] x: told\n"


def test_a_file_is_json_and_its_owners_alone(tmp_path: Path) -> None:
    log_to_file(tmp_path / "daemon.log", "auto", WHOSE, {})
    log.info("ready")
    assert json.loads((tmp_path / "daemon.log").read_text())["message"] == "ready"
    assert (tmp_path / "daemon.log").stat().st_mode & 0o777 == 0o600


def test_the_level_can_be_changed_while_it_runs_and_libraries_stay_quiet() -> None:
    stream = logged("json")
    log.debug("not yet")
    set_level("debug")
    assert logs.level() == "debug"
    log.debug("now")
    logging.getLogger("botocore.endpoint").debug("headers: secret")
    set_level("error")
    log.warning("no more")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["now"]
    with pytest.raises(UsageError, match="no level"):
        set_level("loud")


def test_a_file_that_follows_a_stream_keeps_the_level(tmp_path: Path) -> None:
    logged("json")
    set_level("error")
    log_to_file(tmp_path / "daemon.log", "auto", WHOSE, {})
    assert logs.level() == "error"


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"store 'ftp://me:{SECRET}@host/path': unknown scheme",
        f"proxy http://me:{SECRET}@proxy:3128 refused",
        f"https://me:p@{SECRET}@host/",
        f"GET https://b.s3.amazonaws.com/k?X-Amz-Credential={SECRET}%2Fs3&X-Amz-Signature={SECRET}&a=1",
        f"https://b/k?AWSAccessKeyId={SECRET}&Signature={SECRET}&Expires=1",
        f"POST https://hooks.example.com/x?token={SECRET} answered 500",
        f"secret_access_key={SECRET}, region=eu",
        f"{{'password': '{SECRET}', 'user': 'me'}}",
        f"Authorization: AWS4-HMAC-SHA256 Credential={SECRET}/x, Signature={SECRET}",
        f"headers {{'authorization': 'Bearer {SECRET}'}}",
        f"sent Bearer {SECRET}",
        f"x-amz-security-token: {SECRET}",
        f"the key AKIA{SECRET.upper()}",
        f"signed with whsec_{SECRET}==",
    ],
)
def test_credentials_are_taken_out(text: str) -> None:
    stream = logged("json")
    log.warning("%s", text)
    assert SECRET not in stream.getvalue()
    assert SECRET.upper() not in stream.getvalue()
    assert "***" in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "shared/: restored 3 files, 1.2 MiB, from snapshot 7",
        "s3://bucket/prefix?endpoint_url=https://s3.example.com:9000&region=eu-central-1",
        "a@b.txt is kept in both versions: https://host/a@b",
        "file:///var/lib/agentfuse/store: tokens.json, secrets/readme and basic facts",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("logger", "text", "is_wanted"),
    [
        ("pyfuse3", "fuse_releasedir(): fuse_reply_* failed with No such file or directory", False),
        ("pyfuse3", "fuse_read(): fuse_reply_* failed with Invalid argument", True),
        ("agentfuse.fuse", "fuse_reply_* failed with No such file or directory", True),
    ],
)
def test_an_answer_that_the_kernel_gave_up_on_is_no_error(logger: str, text: str, is_wanted: bool) -> None:
    stream = logged("text")
    logging.getLogger(logger).error("%s", text)
    assert bool(stream.getvalue()) is is_wanted
