"""``agentfuse ls``: what is in a home and who made it, by the daemon's word."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator

import pytest
from fuse.cli_support import Host, new_host

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with new_host() as made:
        made.mount()
        (made.home / "downloads" / "d").mkdir()
        (made.home / "downloads" / "data.csv").write_text("a,b\n")
        (made.home / "downloads" / "d" / ".hidden").write_bytes(b"")
        (made.home / "workspace" / "b\n\udcff").write_bytes(b"x" * 2048)
        (made.home / "workspace" / "a").symlink_to("/etc/passwd")
        (made.home / ".gitconfig").touch()
        yield made


def test_names_are_those_that_ls_shows(host: Host) -> None:
    assert host.run("ls", host.home).stdout.split() == sorted(os.listdir(host.home))
    assert host.run("ls", f"{host.home}:downloads").stdout == "d\ndata.csv\n"
    assert host.run("ls", f"{host.home}:downloads/d/").stdout == ".hidden\n"
    assert host.run("ls", f"{host.home}:downloads/data.csv").stdout == "data.csv\n"
    assert host.run("ls", f"{host.home}:workspace").stdout == "a\nb\\n\\udcff\n"


def test_the_long_form_says_who_made_each_and_what_it_is(host: Host) -> None:
    head, *rows = host.run("ls", "-l", f"{host.home}:downloads").stdout.splitlines()
    assert head.split() == ["ID", "CREATOR", "FROZEN", "SIZE", "TYPE", "CREATED", "MODIFIED", "PATH"]
    directory, file = (row.split() for row in rows)
    modified = time.localtime((host.home / "downloads" / "data.csv").stat().st_mtime)
    created = time.strptime(" ".join(file[6:8]), "%Y-%m-%d %H:%M:%S")
    assert created <= modified
    assert file[1:6] == ["environment", "-", "4", "B", "text/csv"]
    assert file[8:] == [
        *time.strftime("%Y-%m-%d %H:%M:%S", modified).split(),
        "downloads/data.csv",
    ]  # fmt: skip
    assert (directory[1:5], directory[-1]) == (["environment", "-", "-", "dir"], "downloads/d")
    rows = host.run("ls", "-l", host.home).stdout.splitlines()[1:]
    creators = {row.split()[-1]: row.split()[1] for row in rows}
    assert (creators["downloads/"], creators["home/.gitconfig"]) == ("system", "agent")


def test_json_has_all_facts_and_ids_that_stay(host: Host) -> None:
    asked = ("ls", "--json", f"{host.home}:workspace")
    symlink, file = found = json.loads(host.run(*asked).stdout)
    assert json.loads(host.run(*asked).stdout) == found
    assert uuid.UUID(file["id"]).version == 5
    assert (symlink["type"], symlink["created_by"], symlink["mime"]) == ("symlink", "agent", None)
    assert (file["path"], file["size"], file["type"]) == ("b\n\udcff", 2048, "file")


def test_what_is_not_there_is_told(host: Host) -> None:
    for where, said in (
        (f"{host.home}:nowhere", "there is no region"),
        (f"{host.home}:shared/x", "there is no 'shared/x'"),
        (host.base / "elsewhere", "no agentfuse mount at"),
        (f"{host.base}/elsewhere:shared", "no agentfuse mount at"),
    ):
        done = host.run("ls", where)
        assert done.returncode == 66, done.stderr
        assert said in done.stderr


def test_a_mountpoint_may_have_colons_in_its_name() -> None:
    with new_host() as host:
        host.home = host.base / "a:b:c"
        host.home.mkdir()
        host.mount()
        (host.home / "shared" / "x:y").touch()
        assert host.run("ls", f"{host.home}:shared").stdout == "x:y\n"
        assert host.run("ls", f"{host.home}:shared/x:y").stdout == "x:y\n"
        host.kill()
        assert "is dead" in host.run("ls", f"{host.home}:shared").stderr
