#!/bin/sh
# The daemon on the host, the agent in a container without any privilege.
#
#   host-daemon.sh AGENT COMMAND...
#
# ENGINE: podman or docker, IMAGE: what the agent runs in, HOMES: where homes are mounted.
set -eu
agent=$1
shift
homes=${HOMES:-/srv/homes}/$agent
mkdir -p "$homes/agent"

# The container gets the directory above the mountpoint, as a shared mount: a home that is mounted in it later, or
# anew after a crash, is seen inside. A mountpoint that is given itself stays what it was when the container began.
mountpoint -q "$homes" || { mount --bind "$homes" "$homes" && mount --make-shared "$homes"; }

agentfuse mount "$homes/agent" --agent "$agent" --owner 1000:1000 --background

code=0
${ENGINE:-podman} run --rm --interactive --user 1000:1000 \
    --cap-drop all --security-opt no-new-privileges \
    --volume "$homes:/home:rslave" --workdir /home --env HOME=/home/agent \
    ${IMAGE:-debian:12} "$@" || code=$?

agentfuse umount "$homes/agent"
exit $code
