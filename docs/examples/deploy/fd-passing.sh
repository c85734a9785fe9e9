#!/bin/sh
# A container of the daemon's own, in which only the mount helper has a privilege; for Kubernetes' native sidecars.
#
#   fd-passing.sh MOUNTPOINT AGENT
#
# Runs as root with CAP_SYS_ADMIN, CHOWN, FOWNER, KILL, SETUID, SETGID and SETPCAP; MOUNTPOINT is in a volume with
# bidirectional propagation. The daemon is uid 1000 without any capability, and so is the agent in its container. Helper
# and daemon are in one PID namespace: by numbers of processes the daemon knows its own.
set -eu
mountpoint=$1 agent=$2
socket=${SOCKET:-/run/mount.sock}
mkdir -p "$mountpoint" 2>/dev/null || :   # a dead mount from before is the helper's to take away
rm -f "$socket"
: "${AGENTFUSE_STATE:=/var/lib/agentfuse}" "${AGENTFUSE_RUNTIME_DIR:=/run/agentfuse}"
mkdir -p -m 0700 "$AGENTFUSE_STATE" "$AGENTFUSE_RUNTIME_DIR"
chown 1000:1000 "$AGENTFUSE_STATE" "$AGENTFUSE_RUNTIME_DIR"

agentfuse-mount-helper --socket "$socket" --below "$(dirname "$mountpoint")" --user 1000 &
until [ -S "$socket" ]; do sleep 0.05; done

export AGENTFUSE_STATE AGENTFUSE_RUNTIME_DIR AGENTFUSE_MOUNT_HELPER="$socket" HOME=/tmp
setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs \
    agentfuse mount "$mountpoint" --agent "$agent" ${EXECUTION:+--execution "$EXECUTION"} &
daemon=$!
trap 'kill -TERM $daemon 2>/dev/null || :' TERM INT

# The container ends with the daemon, but after it: of a daemon that was killed nothing may stay mounted on the host.
code=0
wait $daemon || code=$?
while kill -0 $daemon 2>/dev/null; do   # it was our own signal that ended the wait
    code=0
    wait $daemon || code=$?
done
umount -q -l "$mountpoint" || :
exit $code
