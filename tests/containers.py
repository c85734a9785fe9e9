"""A container engine for tests: podman with a storage, a namespace and cgroups of its own.

Its image is a directory that has this machine's /usr, this checkout and its interpreter, read-only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ordinary import CHECKOUT

_ENGINE = """#!/bin/sh
# podman, where /sys/fs/cgroup is a plain cgroup2 tree and /dev/fuse is open to everybody, as on most systems.
exec unshare --cgroup --mount --propagation unchanged sh -c '
    set -e
    base=$1
    shift
    # Nothing of this reaches the machine; shared mounts of homes stay shared with it.
    mount --make-slave /
    mount --make-slave "$(findmnt -no TARGET -T "$base")"
    mount --make-rslave /sys
    mount --make-rslave /dev
    umount -l /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    mount -t tmpfs -o dev,mode=0755 none "$base/dev"
    mknod "$base/dev/fuse" c 10 229
    chmod 0666 "$base/dev/fuse"
    mount --bind "$base/dev/fuse" /dev/fuse
    verb=$1
    shift
    if [ $verb = run ] || [ $verb = create ]; then
        case " $* " in *" --network="*) ;; *) set -- "--network=${NETWORK:-none}" "$@" ;; esac
        set -- --cgroups=disabled --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 "$@"
    fi
    exec podman --root "$base/root" --runroot "$base/run" --tmpdir "$base/tmp" --storage-driver vfs \\
        --cgroup-manager cgroupfs --events-backend file --runtime crun $verb "$@"
' sh {base} "$@"
"""


class Engine:
    """``base``: an empty directory. ``environment``: what the recipes of docs/examples/deploy are told.

    With NETWORK in it containers have that network (``ns:/proc/PID/ns/net``), else none.
    """

    def __init__(self, base: Path) -> None:
        rootfs, local = base / "rootfs", base / "local/bin"
        for name in ("etc", "var/lib/agentfuse", "usr", "run", "tmp", "proc", "sys", "dev", "home", "state"):
            (rootfs / name).mkdir(parents=True)
        (rootfs / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            if Path("/", name).is_symlink():
                (rootfs / name).symlink_to(f"usr/{name}")
        (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000::/:/bin/sh\n")
        (rootfs / "etc/group").write_text("root:x:0:\nagent:x:1000:\n")
        local.mkdir(parents=True)
        for name in ("agentfuse", "agentfuse-mount-helper"):
            (local / name).symlink_to(Path(sys.executable).with_name(name))
        (local / "agentfuse-sidecar").symlink_to(Path(CHECKOUT) / "docs/examples/deploy/fd-passing.sh")
        for name in ("root", "run", "tmp", "dev"):
            (base / name).mkdir()
        script = base / "engine"
        script.write_text(_ENGINE.replace("{base}", str(base)))
        script.chmod(0o755)
        bound = [f"--volume={path}:{path}:ro" for path in ("/usr", sys.base_prefix, CHECKOUT)]
        image = [*bound, f"--volume={base}/local:/usr/local:ro", f"--rootfs {rootfs}"]
        self.environment = {
            **os.environ,
            "PATH": f"{local}:{os.environ['PATH']}",
            "ENGINE": str(script),
            "IMAGE": " ".join(image),
        }
