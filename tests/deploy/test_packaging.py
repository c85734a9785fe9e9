"""What a wheel has in it, and that it works where it is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import agentfuse

ROOT = Path(__file__).parents[2]


def test_the_wheel_has_all_that_the_checkout_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(ROOT)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"agentfuse-{agentfuse.__version__}-py3-none-any.whl"
    tracked = subprocess.check_output(["git", "ls-files", "agentfuse"], cwd=ROOT, text=True).splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entries = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        archive.extractall(tmp_path / "installed")
    assert [name for name in tracked if name not in names] == []
    data = {name.partition(".data/data/share/agentfuse/")[2] for name in names}
    assert {f"systemd/{path.relative_to(ROOT / 'systemd')}" for path in ROOT.glob("systemd/**/*.*")} <= {
        *data,
        *(f"systemd/{name}" for name in ("sysusers.d", "tmpfiles.d")),
    }
    assert not any("tests" in name or "__pycache__" in name for name in names)
    for program in ("agentfuse", "agentfuse-mount-helper", "mount.agentfuse", "umount.fuse.agentfuse"):
        assert f"\n{program} = " in entries
    # The packages that it needs are this environment's; itself it is the wheel's.
    code = (
        "import agentfuse, runpy, sys; print(agentfuse.__file__); sys.argv[1:] = ['prompt'];"
        "runpy.run_module('agentfuse', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed"), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path / "installed")), done.stderr
    assert "# Your home directory" in done.stdout
