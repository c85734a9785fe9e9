#!/bin/sh
# Daemon and agent are one ordinary user: fusermount3 mounts, and bubblewrap keeps the agent to its home.
#
#   rootless.sh AGENT COMMAND...
#
# HOMES: where homes are mounted. Once, as root: apt-get install fuse3 bubblewrap. Not under NoNewPrivileges, where
# setuid programs as fusermount3 have no effect.
set -eu
agent=$1
shift
homes=${HOMES:-$HOME/homes}/$agent
mkdir -p "$homes/agent"

agentfuse mount "$homes/agent" --agent "$agent" --background

# The directory above the mountpoint: a home that is mounted in it again after a crash is seen inside, as / is a
# shared mount wherever systemd runs.
code=0
bwrap --unshare-all --die-with-parent --clearenv --setenv PATH /usr/bin:/bin --setenv HOME /home/agent \
    --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 \
    --proc /proc --dev /dev --tmpfs /tmp --bind "$homes" /home --remount-ro /home --remount-ro / \
    --chdir /home/agent "$@" || code=$?

agentfuse umount "$homes/agent"
exit $code
