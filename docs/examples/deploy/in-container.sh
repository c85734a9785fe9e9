#!/bin/sh
# The daemon inside of the agent's container, with what it needs to mount; the agent has none of it.
#
#   in-container.sh AGENT COMMAND...
#
# ENGINE: podman or docker, IMAGE: has agentfuse and fuse3, STATE: where the host keeps what is not in the store yet.
# With AppArmor (Ubuntu's Docker) add --security-opt apparmor=unconfined to ENGINE's options.
set -eu
agent=$1
shift
mkdir -p "${STATE:=/var/lib/agentfuse}"

# shellcheck disable=SC2016  # it is the container's shell that knows these
exec ${ENGINE:-podman} run --rm --interactive --device /dev/fuse \
    --cap-drop all --cap-add SYS_ADMIN --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER \
    --cap-add SETUID --cap-add SETGID --cap-add SETPCAP --security-opt no-new-privileges \
    --volume "$STATE:/var/lib/agentfuse" ${IMAGE:-agentfuse} \
    sh -euc '
        agent=$1
        shift
        mkdir -p /home/agent
        agentfuse mount /home/agent --agent "$agent" --owner 1000:1000 --background
        code=0
        cd /home/agent
        HOME=/home/agent setpriv --reuid=1000 --regid=1000 --clear-groups --bounding-set=-all --inh-caps=-all \
            "$@" || code=$?
        cd /
        agentfuse umount /home/agent
        exit $code
    ' sh "$agent" "$@"
