"""What mount(8) and umount(8) say, in agentfuse's own words."""

from __future__ import annotations

import pytest

from agentfuse.cli import fstab
from agentfuse.errors import UsageError


def test_options_become_flags_and_what_is_the_managers_is_passed_over() -> None:
    options = (
        "rw,agent=alice,store=s3://b/p?endpoint_url=http://x:1&region=r,owner=1:2,noexec,dev,xattrs,_netdev"
    )
    words = fstab._mounting(
        ["agentfuse", "/home/a", "-n", "-o", f"{options},x-systemd.requires=y.service,nofail"]
    )
    assert words == [
        *("mount", "/home/a", "--background", "--agent", "alice"),
        *("--store", "s3://b/p?endpoint_url=http://x:1&region=r", "--owner", "1:2", "--xattrs"),
        *("--mount-option", "noexec,dev"),
    ]
    assert fstab._mounting(["agentfuse", "/home/a", "-f", "-o", "agent=a"]) is None
    assert fstab._mounting(["agentfuse", "/home/a", "-s", "-o", "agent=a,strange=1"]) is not None
    assert fstab._unmounting(["/home/a", "-l", "-n"]) == ["umount", "--lazy", "/home/a"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["agentfuse", "/home/a"], "agent=NAME"),
        (["agentfuse", "/home/a", "-o", "ro,agent=a"], "leave ro out"),
        (["agentfuse", "/home/a", "-o", "agent=a,quota=3"], "no mount option 'quota=3'"),
        (["/home/a", "-o", "agent=a"], "a source and a mountpoint"),
        (["agentfuse", "/home/a", "-z"], "-z"),
        (["agentfuse", "/home/a", "-o", "remount,agent=a"], "umount /home/a, then mount it"),
    ],
)
def test_a_mistake_is_told_with_its_fix(arguments: list[str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        fstab._mounting(arguments)
    assert named in str(caught.value)


def test_a_comma_in_quotation_marks_is_part_of_the_value() -> None:
    words = fstab._mounting(["agentfuse", "/home/a", "-o", 'agent=a,state="/var/lib/x,y",rw'])
    assert words is not None
    assert words[-2:] == ["--state", "/var/lib/x,y"]
