"""Commands as an ordinary user without any privilege, who can reach the interpreter and this checkout.

Either may lie in a directory that is closed to others (/root). It is shown alone of that, in a mount
namespace of the command's own, to which mounts that are made outside later come.
"""

from __future__ import annotations

import sys
from pathlib import Path

UID = 1000
# In a mount namespace that nothing reaches from: others' homes are not looked at there, nor kept alive.
ALONE = "grep ' - fuse' /proc/self/mountinfo | cut -d' ' -f5 | xargs -rn1 umount -l;"
CHECKOUT = str(Path(__file__).parents[1])
_OPEN = r"""
import os, stat, subprocess, sys, tempfile
split = sys.argv.index("--")
paths, command = sys.argv[1:split], sys.argv[split + 1:]
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
def closed_above(path):
    parts = path.split("/")[1:]
    above = ["/" + "/".join(parts[:length]) for length in range(1, len(parts))]
    closed = [each for each in above if os.path.exists(each) and not os.stat(each).st_mode & stat.S_IXOTH]
    return closed[0] if closed else None
ways = {path: tempfile.mkdtemp() for path in paths if closed_above(path)}
for path, aside in ways.items():
    mount("--bind", path, aside)
for path, aside in ways.items():
    while above := closed_above(path):
        mount("-t", "tmpfs", "-o", "mode=0755", "none", above)
    os.makedirs(path, exist_ok=True)
    mount("--bind", aside, path)
for aside in ways.values():
    subprocess.run(["umount", "-l", aside], check=True)
    os.rmdir(aside)
os.execvp(command[0], command)
"""


def ordinary(uid: int = UID, *, setuid: bool = False) -> tuple[str, ...]:
    """What goes before a command, to run it as this user with no capability, and no way to get one: setuid
    has no effect unless wanted."""
    return (
        *("unshare", "--mount", "--propagation", "slave"),
        *(sys.executable, "-c", _OPEN, sys.base_prefix, CHECKOUT, "--"),
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
        *(("--inh-caps=-all",) if setuid else ("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")),
    )
