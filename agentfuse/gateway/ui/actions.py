"""What a person may do to an execution, and where its pages are."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.ui.pages import BASE
from agentfuse.gateway.ui.text import path_query

_ACTIVE = (Status.RUNNING, Status.PAUSED, Status.PAUSED_BY_AGENT, Status.AWAITING_CONFIRMATION)


@dataclass(frozen=True, slots=True)
class Action:
    """What leads to a status, and what is asked before."""

    name: str
    label: str
    status: Status
    question: str
    consequence: str
    is_final: bool = False


_END = "What runs in it is ended, its files are saved, and it is marked as {}. It cannot be started again."

ACTIONS = {
    each.name: each
    for each in (
        Action(
            "pause",
            "Pause",
            Status.PAUSED,
            "Pause this execution?",
            "What runs in it stands still until it is resumed. Its files can be read and added to meanwhile.",
        ),
        Action(
            "resume",
            "Resume",
            Status.RUNNING,
            "Resume this execution?",
            "What runs in it goes on where it stood still.",
        ),
        Action(
            "finish",
            "Finish",
            Status.COMPLETED,
            "Finish this execution?",
            _END.format("completed"),
            is_final=True,
        ),
        Action(
            "cancel",
            "Cancel",
            Status.CANCELLED,
            "Cancel this execution?",
            _END.format("cancelled"),
            is_final=True,
        ),
    )
}


def is_active(execution: Execution) -> bool:
    """Whether its home is mounted and goes on."""
    return execution.ends_as is None and execution.status in _ACTIVE


def is_possible(action: Action, execution: Execution) -> bool:
    """Whether it makes sense now."""
    if action.name == "pause":
        return execution.ends_as is None and execution.status is Status.RUNNING
    if action.name == "resume":
        return is_active(execution) and execution.status is not Status.RUNNING
    return execution.ends_as is None and not execution.status.is_terminal


def address(execution: Execution, what: str = "", path: bytes = b"") -> str:
    """A page of an execution; ``path`` begins with a region."""
    where = f"{BASE}/executions/{quote(execution.id, safe='')}{what}"
    return f"{where}?path={path_query(path)}" if path else where
