"""What becomes of the executions of a host that is lost, by the rule that it gave itself.

Any number of hosts may do this at the same time, and the lost one may come back while they do: every change
is a compare-and-set of the execution's record, and says nothing of an epoch later than the one that was
seen to end.
"""

from __future__ import annotations

import logging
import time

import msgspec

from agentfuse.errors import NotFoundError
from agentfuse.gateway.executions.record import Execution, Status
from agentfuse.gateway.executions.records import Records
from agentfuse.gateway.hosts.roster import Host, Roster

_LOG = logging.getLogger(__name__)

FORGET_S = 7 * 24 * 3600.0
"""A lost host's record is removed after so long, if nothing waits for it."""


def settle(records: Records, roster: Roster, host: Host) -> None:
    """Fail what a dead host had, or leave it to wait; and remove the record of one that has nothing and is
    dead for long. Blocks; may be repeated, and is: an execution may have been begun in the moment of death.
    Raises ``StoreError``.
    """
    unfinished = [
        execution
        for organization in records.organizations()
        for execution in records.list(organization)
        if is_of(execution, host)
    ]
    if host.on_host_lost == "fail":
        for execution in unfinished:
            _fail(records, execution, host)
    elif unfinished:
        return
    if time.time() - host.at > FORGET_S:
        _LOG.warning("host %s at %s is forgotten: it was lost long ago", host.id, host.url)
        roster.remove(host.id)


def is_of(execution: Execution, host: Host) -> bool:
    """Whether an execution was left unfinished by a host in this epoch or one before."""
    is_theirs = execution.host == host.id and execution.epoch <= host.epoch
    return is_theirs and not execution.status.is_terminal


def _fail(records: Records, execution: Execution, host: Host) -> None:
    reason = f"the host that it ran on is lost ({host.id}, {host.url})"

    def failed(found: Execution) -> Execution:
        if not is_of(found, host):
            return found
        status = Status.CANCELLED if found.ends_as is Status.CANCELLED else Status.FAILED
        return msgspec.structs.replace(found.with_status(status), reason=reason)

    try:
        after = records.change(execution.organization, execution.id, failed)
    except NotFoundError:
        return
    if after.reason == reason:
        _LOG.warning("execution %s is %s: %s", execution.id, after.status, reason)
