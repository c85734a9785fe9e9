"""Whose a new file is: rules in order, facts of a process from /proc, and the region's own default."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agentfuse.attribution import CreatorRule
from agentfuse.errors import EnvironmentProblem
from agentfuse.home import marks
from agentfuse.home.creators import Caller, Creator, Creators

PID = 4711
USER, AGENT, ENVIRONMENT, SYSTEM = Creator.USER, Creator.AGENT, Creator.ENVIRONMENT, Creator.SYSTEM


class FakeProc:
    """A /proc with this process, the first one, and one more thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("self", "1", str(PID)):
            if name != "self":
                (path / name / "ns").mkdir(parents=True)
        (path / str(os.getpid()) / "ns").mkdir(parents=True)
        (path / "self").symlink_to(str(os.getpid()))
        self.says(os.getpid(), namespace="mnt:[1]")
        self.says(1, namespace="mnt:[2]")

    def says(self, pid: int, *, exe: str = "", cgroup: str = "", namespace: str = "mnt:[1]") -> None:
        at = self.path / str(pid)
        for name, target in (("exe", exe), ("ns/mnt", namespace)):
            (at / name).unlink(missing_ok=True)
            if target:
                (at / name).symlink_to(target)
        (at / "cgroup").write_text(f"4:memory:/other\n0::{cgroup}\n" if cgroup else "4:memory:/browser\n")

    def creators(self, *rules: CreatorRule, **options: Any) -> Creators:
        return Creators(rules, proc=self.path, **options)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def test_the_first_rule_that_fits_counts_and_the_region_when_none_does() -> None:
    creators = Creators(
        [CreatorRule(USER, uid=1000, gid=7), CreatorRule(AGENT, uid=1000), CreatorRule(SYSTEM, gid=7)]
    )
    said = {ids: creators.of(Caller(*ids), ENVIRONMENT) for ids in [(1000, 7), (1000, 8), (5, 7), (5, 8)]}
    assert said == {(1000, 7): USER, (1000, 8): AGENT, (5, 7): SYSTEM, (5, 8): ENVIRONMENT}


def test_a_helper_of_the_daemons_counts_before_every_rule() -> None:
    creators = Creators([CreatorRule(AGENT, uid=0)], {PID: USER}.get)
    assert creators.of(Caller(0, 0, PID), SYSTEM) is USER
    assert creators.of(Caller(0, 0, PID + 1), SYSTEM) is AGENT


def test_an_agent_with_a_uid_to_itself_is_no_person_and_not_the_platform_by_default() -> None:
    creators = Creators(agent_uid=1000)
    assert [creators.of(Caller(1000, 1000), each) for each in (USER, SYSTEM, ENVIRONMENT, AGENT)] == [
        AGENT, AGENT, ENVIRONMENT, AGENT,
    ]  # fmt: skip
    assert creators.of(Caller(0, 0), USER) is USER
    assert creators.of(Caller(os.geteuid(), 0), USER) is USER


def test_nor_is_any_other_uid_that_it_may_have_mapped() -> None:
    creators = Creators(agent_uid=1000)
    assert [creators.of(Caller(100_000, 0), each) for each in (USER, SYSTEM, ENVIRONMENT)] == [
        AGENT, AGENT, ENVIRONMENT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exe", "fits"),
    [
        ("/opt/web/chrome", True),
        ("/opt/web/chrome (deleted)", True),
        ("/opt/web/deep/chrome", False),
        ("/opt/web/chromedriver", False),
        ("/home/agent/opt/web/chrome", False),
        ("", False),
    ],
)
def test_an_executable_is_told_by_its_path(proc: FakeProc, exe: str, fits: bool) -> None:
    proc.says(PID, exe=exe)
    creators = proc.creators(CreatorRule(USER, exe="/opt/*/chrome"))
    assert creators.of(Caller(0, 0, PID), AGENT) is (USER if fits else AGENT)


@pytest.mark.parametrize(("namespace", "fits"), [("mnt:[1]", True), ("mnt:[2]", True), ("mnt:[3]", False)])
def test_a_path_in_a_mount_namespace_of_its_own_proves_nothing(
    proc: FakeProc, namespace: str, fits: bool
) -> None:
    proc.says(PID, exe="/opt/chrome", namespace=namespace)
    creators = proc.creators(CreatorRule(USER, exe="/opt/chrome"))
    assert creators.of(Caller(0, 0, PID), AGENT) is (USER if fits else AGENT)


@pytest.mark.parametrize(
    ("rule", "cgroup", "fits"),
    [
        ("/browser", "/browser", True),
        ("/browser", "/browser/tab/1", True),
        ("/browser", "/browsers", False),
        ("/browser", "/agent/browser", False),
        ("/user.slice/*/web-*.scope", "/user.slice/user-7.slice/web-9.scope/x", True),
        ("/user.slice/*/web-*.scope", "/user.slice/web-9.scope", False),
        ("/browser", "", False),
    ],
)
def test_a_cgroup_is_told_by_its_path_or_one_above_it(
    proc: FakeProc, rule: str, cgroup: str, fits: bool
) -> None:
    proc.says(PID, cgroup=cgroup)
    creators = proc.creators(CreatorRule(USER, cgroup=rule))
    assert creators.of(Caller(0, 0, PID), AGENT) is (USER if fits else AGENT)


@pytest.mark.parametrize("pid", [0, PID + 1])
def test_of_a_process_that_is_gone_or_not_to_be_seen_the_next_rule_tells(proc: FakeProc, pid: int) -> None:
    creators = proc.creators(
        CreatorRule(USER, exe="/opt/*"), CreatorRule(USER, cgroup="/"), CreatorRule(SYSTEM, uid=5)
    )
    assert creators.of(Caller(5, 5, pid), AGENT) is SYSTEM
    assert creators.of(Caller(6, 6, pid), AGENT) is AGENT


def test_nobody_is_looked_at_of_whom_an_earlier_rule_or_another_key_decides(
    proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    creators = proc.creators(
        CreatorRule(AGENT, uid=1000), CreatorRule(USER, uid=5, exe="/opt/chrome", cgroup="/browser")
    )

    def look(*arguments: object) -> str:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(os, "readlink", look)
    assert creators.of(Caller(1000, 0, PID), ENVIRONMENT) is AGENT
    assert creators.of(Caller(6, 0, PID), ENVIRONMENT) is ENVIRONMENT
    with pytest.raises(AssertionError, match="it was looked at"):
        creators.of(Caller(5, 0, PID), ENVIRONMENT)


def test_a_proc_of_other_processes_is_refused_if_a_rule_needs_it(tmp_path: Path) -> None:
    Creators([CreatorRule(USER, uid=1)], proc=tmp_path)
    for rule in (CreatorRule(USER, exe="/bin/sh"), CreatorRule(USER, cgroup="/x")):
        with pytest.raises(EnvironmentProblem, match="use uid and gid"):
            Creators([rule], proc=tmp_path)


# The mark ------------------------------------------------------------------------------------------------


def test_what_cannot_be_marked_is_left_alone(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    for name in (b"link", b"fifo", b"file", b"dir"):
        Creators().attribute(fd, name, Caller(0, 0), USER)
        if name == b"link":
            assert marks.read_creator(str(tmp_path / "file")) is AGENT
    os.close(fd)
    assert marks.read_creator(str(tmp_path / "file")) is USER
    assert marks.read_creator(str(tmp_path / "dir")) is USER
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0


def test_the_agents_own_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as file:
        Creators().attribute(file.fileno(), None, Caller(0, 0), AGENT)
    assert os.listxattr(tmp_path / "file") == []


def test_a_filesystem_without_attributes_makes_files_all_the_same_and_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "setxattr", refuse)
    creators = Creators()
    with (tmp_path / "file").open("w") as file:
        for _ in range(3):
            creators.attribute(file.fileno(), None, Caller(0, 0), USER)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_mark_that_nobody_of_us_wrote_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for value in (b"nobody", b"\xff", b""):
        os.setxattr(tmp_path / "file", marks.CREATOR, value)
        assert marks.read_creator(str(tmp_path / "file")) is AGENT
