"""A process dies at the step that was armed, at no other, and never unarmed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentfuse import killpoints

PASSES = """
from agentfuse.killpoints import passing
for number in range(5):
    print(number, flush=True)
    passing("write.begun")
"""


def run(armed: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, killpoints.VARIABLE: armed}
    return subprocess.run(
        [sys.executable, "-c", PASSES], env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("armed", "printed"), [("write.begun", "0"), ("write.begun:3", "0 1 2")])
def test_the_environment_names_the_step_and_the_passing(armed: str, printed: str) -> None:
    done = run(armed)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == printed.split()


@pytest.mark.parametrize("armed", ["", "write.written", "write.begun:6"])
def test_what_is_not_armed_or_not_reached_does_nothing(armed: str) -> None:
    done = run(armed)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "1", "2", "3", "4"])


def test_a_step_there_is_none_of_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no step 'write.never'; there are: "):
        killpoints.arm("write.never")
    assert run("write.never").returncode == 1


def test_every_step_is_passed_somewhere() -> None:
    package = Path(killpoints.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    passed = set(re.findall(r'\bpassing\("([a-z.-]+)"\)', source))
    assert passed == set(killpoints.STEPS)
