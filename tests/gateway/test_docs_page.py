"""The page of the routes, in a real browser and under its own strict policy."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from gateways import DEADLINE_S, Gateway


def test_a_browser_shows_every_route(gateway: Gateway, tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", f"{gateway.url}/docs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    shown = set(re.findall(r"<b>([A-Z]+)</b><code>([^<]+)</code>", done.stdout))
    with gateway.client("") as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert shown == {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert "CONSOLE" not in done.stderr
