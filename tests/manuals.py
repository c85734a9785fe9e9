"""A page's examples as they are shown, played in a machine of their own: mounts, processes and network.

``/home``, ``/srv``, ``/var/lib`` and ``/run`` are empty there, and so is ``~``: commands run as the page has
them, by root, one after the other in one bash. In what a page shows

- ``…`` stands for anything within a line, and for any lines where it stands alone;
- ids (UUIDs), dates, times of day, durations, pids, and the widths of columns may be others. An id that came
  out is meant wherever the page later has the one that it shows;
- a command that fails must show its error, in a line that begins with its name or ``bash:``;
- lines of progress, which slow machines print every two seconds, do not count;
- of what runs in the background (``&``) the lines that are shown must come first.

``ls`` has columns, as on a terminal, and memory is not synced unless the page says so.
Blocks of ``console`` and ``python`` are played, others (``sh``, ``toml`` and those without a word) are not.
``manuals.py PAGE`` shows to who writes one what its commands print.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_VARYING = (
    (_UUID, "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "DATE"),
    (re.compile(r"\d\d:\d\d(:\d\d)?(\.\d+)?(Z|\+00:00)?"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? ?(s|ms|us|[kMG]?B/s)\b"), "RATE"),
    (re.compile(r"\b(pid|PID) \d+"), "PID"),
    (re.compile(r"[ \t]+"), " "),
)
_PROGRESS = re.compile(r"^[a-z ]+: \d+(?: of \d+)? files, .*\n", re.MULTILINE)
_COVERED = ("/home", "/srv", "/var/lib", "/run")
_ENTER = r"""
set -e
base=$1
# Others' homes came along with the mounts that were there: here they are not kept alive.
awk '$0 ~ / - fuse.agentfuse / {print $5}' /proc/self/mountinfo |
  while read -r each; do umount -l "$(printf '%b' "$each")"; done
mkdir "$base/checkout"; mount --bind "$ROOT" "$base/checkout"
for each in $COVERED; do mkdir -p "$base$each"; mount --bind "$base$each" "$each"; done
test -d "$ROOT" || { mkdir -p "$ROOT"; mount --bind "$base/checkout" "$ROOT"; }
mkdir -p "$HOME"; cd "$HOME"
printf 'sync_delay = "1h"\ncheckpoint_interval = "1h"\n' >"$AGENTFUSE_CONFIG"
ls() { if [ -p /dev/stdout ]; then command ls "$@"; else command ls -C "$@"; fi; }
export -f ls
ip link set lo up
exec bash --norc --noprofile
"""


class Step(NamedTuple):
    """A command, or a whole Python program, with the output that the page shows."""

    command: str
    shown: str


def steps(page: Path) -> Iterator[Step]:
    """What a page plays, in its order."""
    for kind, block in re.findall(
        r"^```(console|python)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        if kind == "python":
            yield Step(f"python3 - <<'PYTHON'\n{block}PYTHON", "…\n")
            continue
        parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block, flags=re.MULTILINE)
        assert not parts[0], f"{page.name}: a block of console begins with a command"
        yield from map(Step, parts[1::2], parts[2::2])


class Shell:
    """A bash that a page's commands are typed into."""

    def __init__(self, process: subprocess.Popen[str], base: Path) -> None:
        self._process = process
        self._base = base
        self._ids: dict[str, str] = {}

    def play(self, step: Step) -> str:
        """Run it; what is wrong with what came out, or nothing."""
        command, shown = self._renamed(step.command), self._renamed(step.shown)
        output, assigned = self._base / "output", self._process.stdin
        output.write_text("")
        assert assigned is not None and self._process.stdout is not None
        assigned.write(f"{{ {command}\n}} >'{output}' 2>&1 </dev/null; echo $?\n")
        assigned.flush()
        code = self._process.stdout.readline().strip()
        deadline = time.monotonic() + 60
        while (
            command.endswith("&") and not matches(shown, output.read_text()) and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        said = output.read_text(errors="backslashreplace")
        output.unlink()  # what runs in the background goes on writing into the one that it has
        if not matches(shown, said):
            return f"$ {command}\nprinted\n{said}\nbut the page shows\n{shown}"
        self._ids.update(zip(_UUID.findall(shown), _UUID.findall(said), strict=False))
        name = re.split(r"[ /]", command.strip())[0]
        if code != "0" and not re.search(rf"^(bash|{re.escape(name)}): ", said, re.MULTILINE):
            return f"$ {command}\nended with {code or 'the shell'}, and printed\n{said}"
        return ""

    def _renamed(self, text: str) -> str:
        return _UUID.sub(lambda found: self._ids.get(found[0], found[0]), text)


def matches(shown: str, said: str) -> bool:
    """Whether an output is what a page shows, but for what may be different."""
    said = _PROGRESS.sub("", said)
    for pattern, word in _VARYING:
        shown, said = pattern.sub(word, shown), pattern.sub(word, said)
    lines = [
        "(?:.*\n)*" if line.strip() == "…" else ".*".join(map(re.escape, line.rstrip().split("…"))) + " *\n"
        for line in shown.splitlines()
    ]
    return re.fullmatch("".join(lines), said if said.endswith("\n") or not said else said + "\n") is not None


@contextmanager
def machine(base: Path) -> Iterator[Shell]:
    """A fresh one; ``base`` is an empty directory. Whatever runs or is mounted there ends with it."""
    environ = {
        "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(base / "root"), "LC_ALL": "C.UTF-8", "COLUMNS": "120", "GIT_CONFIG_GLOBAL": "/dev/null",
        "ROOT": str(ROOT), "COVERED": " ".join(_COVERED), "TZ": "UTC",
        "AGENTFUSE_CONFIG": str(base / "config.toml"),
    }  # fmt: skip
    alone = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    process = subprocess.Popen(
        [*alone, "bash", "-c", _ENTER, "enter", str(base)], env=environ, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Shell(process, base)
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    from mounts import base_directory, remove_base

    place = base_directory()
    try:
        with machine(place) as played:
            for each in steps(Path(sys.argv[1])):
                sys.stdout.write(played.play(each) or f"ok: {each.command.splitlines()[0]}\n")
    finally:
        remove_base(place)
