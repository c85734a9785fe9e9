"""What the daemon's log leaves out."""

from __future__ import annotations

import logging

import pytest

from agentfuse.cli.serving import _wanted


@pytest.mark.parametrize(
    ("logger", "text", "wanted"),
    [
        ("pyfuse3", "fuse_releasedir(): fuse_reply_* failed with No such file or directory", False),
        ("pyfuse3", "fuse_read(): fuse_reply_* failed with Invalid argument", True),
        ("agentfuse.fuse", "fuse_reply_* failed with No such file or directory", True),
    ],
)
def test_an_answer_that_the_kernel_gave_up_on_is_no_error(logger: str, text: str, wanted: bool) -> None:
    assert _wanted(logging.LogRecord(logger, logging.ERROR, "", 0, text, (), None)) is wanted
