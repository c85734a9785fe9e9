#!/bin/sh
# Daemon and agent in a container that has no capability at all: it mounts in a user namespace of its own.
#
#   no-capabilities.sh AGENT COMMAND...
#
# ENGINE: podman or docker, IMAGE: has agentfuse and fuse3, STATE: a directory of uid 1000's. Whoever runs this must
# be able to open /dev/fuse (mode 0666 on most systems), and the container's seccomp filter must let it unshare(2).
set -eu
agent=$1
shift

exec ${ENGINE:-podman} run --rm --interactive --device /dev/fuse --user 1000:1000 \
    --cap-drop all --security-opt no-new-privileges --security-opt seccomp=unconfined \
    --volume "${STATE:-$HOME/.local/state/agentfuse}:/state" --env AGENTFUSE_STATE=/state \
    --env AGENTFUSE_RUNTIME_DIR=/tmp/agentfuse --env HOME=/tmp \
    ${IMAGE:-agentfuse} \
    unshare --user --map-root-user --mount agentfuse run --agent "$agent" -- "$@"
