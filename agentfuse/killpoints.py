"""Named steps at which this process can be made to die, as it would of a power cut or a kill -9.

The crash tests arm one, by :func:`arm` or by the environment (``AGENTFUSE_KILL_AT=write.written:3``: at
the third passing). Unarmed, passing a step is one comparison. Knows nothing of the steps but their names.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Literal, get_args

Step = Literal[
    "create.made",
    "write.begun",
    "write.written",
    "write.booked",
    "truncate.cut",
    "unlink.gone",
    "rename.moved",
    "rename.booked",
    "close.last",
    "capture.looked",
    "capture.still",
    "capture.taken",
    "capture.moving",
    "capture.hashed",
    "upload.begun",
    "upload.sent",
    "intent.noted",
    "commit.begun",
    "commit.won",
    "commit.answer-lost",
    "send.sent",
    "checkpoint.committed",
    "note.begun",
    "note.between",
    "note.written",
    "record.begun",
    "record.written",
    "restore.begun",
    "restore.content",
    "restore.complete",
    "restore.noted",
    "fill.claimed",
    "fill.written",
    "fill.here",
    "settle.synced",
    "settle.unmarked",
    "finish.begun",
    "finish.committed",
    "end.flushed",
    "announce.begun",
    "announce.judged",
    "announce.committed",
    "announce.told",
    "webhook.taken",
    "inbox.noted",
    "inbox.put",
    "inbox.removed",
    "remove.begun",
    "remove.cleared",
    "execution.noted",
    "execution.claimed",
    "execution.created",
    "execution.mounted",
    "execution.attached",
    "execution.launched",
    "execution.running",
    "execution.ending",
    "execution.flushed",
    "execution.terminal",
]
STEPS: tuple[Step, ...] = get_args(Step)
VARIABLE = "AGENTFUSE_KILL_AT"

_step = ""
_passings = 0


def passing(step: Step) -> None:
    """Die here by SIGKILL if this is the step that was armed, and the passing of it."""
    if step == _step:
        _pass()


def arm(step: str, passing_number: int = 1) -> None:
    """Die at a passing of a step, counted from 1 from now on; an empty step disarms.

    Raises ``ValueError`` for a step there is none of.
    """
    global _step, _passings
    if step and step not in STEPS:
        raise ValueError(f"no step {step!r}; there are: {', '.join(STEPS)}")
    _step, _passings = step, passing_number


def arm_from(environ: Mapping[str, str]) -> None:
    """Arm what the environment names, if it does. Raises ``ValueError`` as :func:`arm` does."""
    name, _, number = environ.get(VARIABLE, "").partition(":")
    if name:
        arm(name, int(number or 1))


def _pass() -> None:
    global _passings  # noqa: PLW0603
    _passings -= 1
    if _passings == 0:
        os.kill(os.getpid(), signal.SIGKILL)


arm_from(os.environ)
