"""Whether the tests of deployment can fail: each key line is taken out of a copy, and the test that
must notice is run there (``scripts/test-deploy --prove``). Takes minutes, so it is for by hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ordinary import CHECKOUT

RECIPE = "docs/examples/deploy/host-daemon.sh"
UNIT = "systemd/agentfuse@.service"
SYSTEMD = "tests/deploy/test_systemd.py::"
STALE = ("agentfuse/mountpoint.py", "mounter.detach(lazy=True)", "mounter.detach(lazy=False)")


@dataclass(frozen=True)
class Proof:
    """``edits``: what is replaced by what in which files; "" removes."""

    what: str
    test: str
    edits: tuple[tuple[str, str, str], ...]


PROOFS = (
    Proof(
        "propagation into a container",
        "tests/deploy/test_containers.py::test_a_running_container_sees_the_home_that_comes_back",
        ((RECIPE, ":/home:rslave", ":/home"),),
    ),
    Proof(
        "the directory of homes is shared",
        "tests/deploy/test_containers.py::test_a_running_container_sees_the_home_that_comes_back",
        ((RECIPE, ' && mount --make-shared "$homes"', ' && mount --make-private "$homes"'),),
    ),
    Proof(
        "propagation into run --sandbox",
        "tests/deploy/test_run_sandbox.py::test_a_killed_daemon_is_replaced_under_the_running_agent",
        (("agentfuse/cli/sandbox.py", "            _share(homes)\n", ""),),
    ),
    Proof(
        "lazy unmount before a restart",
        "tests/fuse/test_sandbox.py::test_a_killed_daemon_is_replaced_under_a_running_sandbox",
        (STALE,),
    ),
    Proof(
        "lazy unmount before a restart, by the unit as well",
        f"{SYSTEMD}test_a_killed_daemon_comes_back_under_its_running_agent",
        (STALE, (UNIT, "ExecStopPost=-umount -i -q -l ${MOUNTPOINT}\n", "")),
    ),
    Proof(
        "mode of the mountpoint",
        f"{SYSTEMD}test_nothing_is_written_under_the_mountpoint",
        (("agentfuse/mountpoint.py", "CLOSED_MODE = 0o555", "CLOSED_MODE = 0o755"),),
    ),
    Proof(
        "the mountpoint is immutable, for root",
        f"{SYSTEMD}test_nothing_is_written_under_the_mountpoint",
        (("agentfuse/mountpoint.py", "_set_immutable(directory, immutable=True)", "pass"),),
    ),
    Proof(
        "restart after a kill",
        f"{SYSTEMD}test_a_killed_daemon_comes_back_under_its_running_agent",
        ((UNIT, "Restart=on-failure\n", ""),),
    ),
    Proof(
        "a daemon that hangs is killed",
        f"{SYSTEMD}test_a_daemon_that_hangs_is_replaced",
        ((UNIT, "WatchdogSec=15\n", ""),),
    ),
    Proof(
        "a flush may take longer",
        f"{SYSTEMD}test_a_stop_waits_for_a_slow_store_and_credentials_come_from_the_manager",
        (("agentfuse/supervision.py", ', f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}"', ""),),
    ),
    Proof(
        "credentials",
        f"{SYSTEMD}test_a_stop_waits_for_a_slow_store_and_credentials_come_from_the_manager",
        ((UNIT, "LoadCredential=aws:/etc/agentfuse/aws-credentials\n", ""),),
    ),
    Proof(
        "a hidden mount is noticed",
        f"{SYSTEMD}test_a_hidden_mount_is_a_failed_start",
        ((UNIT, "ExecStartPost=mountpoint -q ${MOUNTPOINT}\n", ""),),
    ),
    Proof(
        "homes and launchers outlive the gateway",
        f"{SYSTEMD}test_homes_and_launchers_are_units_that_outlive_the_gateway",
        (("systemd/agentfuse-gateway.service", "Environment=AGENTFUSE_STARTER=systemd\n", ""),),
    ),
    Proof(
        "recovery after a power cut",
        f"{SYSTEMD}test_a_power_cut_loses_nothing_that_was_closed",
        (("systemd/agentfuse-recover.service", "ExecStart=agentfuse recover", "ExecStart=true"),),
    ),
)


def main(words: list[str]) -> int:
    """Try all of them, or those whose name has one of the words in it."""
    wanted = [proof for proof in PROOFS if not words or any(word in proof.what for word in words)]
    broken = 0
    # Beside the checkout: units with PrivateTmp would not see it in /tmp.
    beside = Path(CHECKOUT).parent
    with tempfile.TemporaryDirectory(prefix=".agentfuse-prove-", dir=beside) as made:
        copy = Path(made)
        copy.chmod(0o755)
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
        ).stdout
        subprocess.run(
            ["rsync", "-a", "--from0", "--files-from=-", f"{CHECKOUT}/", f"{copy}/"], input=files, check=True
        )
        subprocess.run(["scripts/setup", "--test"], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        for proof in wanted:
            began = time.monotonic()
            verdict = _try(copy, proof)
            broken += not verdict.startswith("fails")
            _say(
                f"{verdict:28} {time.monotonic() - began:5.0f} s  {proof.what} ({proof.test.split('::')[1]})"
            )
    _say(f"{len(wanted)} lines, {broken} of them not missed")
    return 1 if broken else 0


def _try(copy: Path, proof: Proof) -> str:
    before = {}
    try:
        for name, old, new in proof.edits:
            text = before.setdefault(copy / name, (copy / name).read_text())
            if text.count(old) < 1:
                return "NOT THERE, correct prove.py"
            (copy / name).write_text(text.replace(old, new))
        return _run(copy, proof.test)
    finally:
        for path, text in before.items():
            path.write_text(text)


def _run(copy: Path, test: str) -> str:
    command = [copy / ".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return "PASSES: it cannot fail"
    if done.returncode == 1 and re.search(r"^1 failed", done.stdout, re.MULTILINE):
        return "fails as it should"
    return f"BROKEN, pytest says {done.returncode}: {done.stdout[-2000:]}{done.stderr[-500:]}"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
