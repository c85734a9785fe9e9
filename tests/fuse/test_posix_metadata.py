"""Modes, owners, times and link counts."""

import errno
import os
import socket
import stat
import time
from pathlib import Path

import pytest
from mounts import AGENT_UID
from syscalls import UTIME_NOW, UTIME_OMIT, in_child, refused, utimensat

CLOCK_REALTIME_COARSE = 5
OLD = 1_000_000_000_000_000_000
needs_root = pytest.mark.usefixtures("root")


@pytest.fixture
def root() -> None:
    """These tests change users; an ordinary user's mount is test_rootless.py's."""
    assert os.geteuid() == 0, "run the tests as root"


def aged(path: Path) -> Path:
    """Make a path look old, so that a new time shows."""
    os.utime(path, ns=(OLD, OLD), follow_symlinks=False)
    return path


def is_recent(nanoseconds: int) -> bool:
    return abs(time.time_ns() - nanoseconds) < 60_000_000_000


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o755, 0o777, 0o4755, 0o2755, 0o1777, 0o7777])
def test_chmod_sets_every_bit(work: Path, mode: int) -> None:
    (work / "directory").mkdir()
    (work / "directory").chmod(mode)
    assert stat.S_IMODE((work / "directory").stat().st_mode) == mode
    (work / "directory").chmod(0o755)


def test_umask_applies_to_everything_that_is_made(work: Path) -> None:
    def child() -> list[int]:
        os.umask(0o027)
        os.close(os.open(work / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(work / "directory", 0o777)
        os.mkfifo(work / "fifo", 0o666)
        return [stat.S_IMODE(os.stat(work / n).st_mode) for n in ("file", "directory", "fifo")]

    assert in_child(child) == [0o640, 0o750, 0o640]


@needs_root
def test_new_files_belong_to_who_made_them(work: Path) -> None:
    work.chmod(0o777)

    def child() -> None:
        (work / "file").touch()
        (work / "directory").mkdir()
        (work / "link").symlink_to("file")
        os.mkfifo(work / "fifo")

    in_child(child, uid=AGENT_UID)
    for name in ("file", "directory", "link", "fifo"):
        st = os.lstat(work / name)
        assert (st.st_uid, st.st_gid) == (AGENT_UID, AGENT_UID), name


@needs_root
def test_chown_changes_owner_and_clears_set_id_bits(work: Path) -> None:
    path = work / "file"
    path.touch()
    path.chmod(0o6755)
    os.chown(path, AGENT_UID, AGENT_UID + 1)
    st = path.stat()
    assert (st.st_uid, st.st_gid) == (AGENT_UID, AGENT_UID + 1)
    assert stat.S_IMODE(st.st_mode) == 0o755
    os.chown(path, -1, AGENT_UID)
    assert (path.stat().st_uid, path.stat().st_gid) == (AGENT_UID, AGENT_UID)


@needs_root
def test_a_write_by_its_owner_clears_set_id_bits(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    os.chown(path, AGENT_UID, AGENT_UID)
    path.chmod(0o6755)
    in_child(lambda: path.write_bytes(b"y"), uid=AGENT_UID)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@needs_root
def test_setgid_directories_hand_their_group_down(work: Path) -> None:
    parent = work / "team"
    parent.mkdir()
    os.chown(parent, 0, AGENT_UID + 7)
    parent.chmod(0o2777)

    def child() -> None:
        (parent / "file").touch()
        (parent / "directory").mkdir()

    in_child(child, uid=AGENT_UID)
    assert (parent / "file").stat().st_gid == AGENT_UID + 7
    assert (parent / "directory").stat().st_gid == AGENT_UID + 7
    assert (parent / "directory").stat().st_mode & stat.S_ISGID


@needs_root
def test_sticky_directories_protect_other_people_s_files(work: Path) -> None:
    sticky = work / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    in_child((sticky / "mine").touch, uid=AGENT_UID)

    def thief() -> None:
        with refused(errno.EPERM, errno.EACCES):
            (sticky / "mine").unlink()
        with refused(errno.EPERM, errno.EACCES):
            os.rename(sticky / "mine", sticky / "stolen")

    in_child(thief, uid=AGENT_UID + 1)
    in_child((sticky / "mine").unlink, uid=AGENT_UID)


@needs_root
def test_permissions_are_enforced_for_ordinary_users(work: Path) -> None:
    (work / "secret").write_bytes(b"x")
    (work / "secret").chmod(0o600)
    (work / "closed").mkdir()
    (work / "closed").chmod(0o700)
    (work / "closed" / "file").touch()

    def stranger() -> None:
        for attempt in (
            (work / "secret").read_bytes,
            lambda: (work / "secret").write_bytes(b"y"),
            (work / "new").touch,
            (work / "closed" / "file").stat,
            lambda: os.listdir(work / "closed"),
            (work / "secret").unlink,
        ):
            with refused(errno.EACCES):
                attempt()
        with refused(errno.EPERM):
            (work / "secret").chmod(0o666)
        assert not os.access(work / "secret", os.R_OK)
        assert os.access(work, os.R_OK | os.X_OK)

    in_child(stranger, uid=AGENT_UID)


@needs_root
def test_supplementary_groups_count(work: Path) -> None:
    (work / "shared").write_bytes(b"x")
    os.chown(work / "shared", 0, 7777)
    (work / "shared").chmod(0o640)
    assert in_child((work / "shared").read_bytes, uid=AGENT_UID, groups=(7777,)) == b"x"
    with refused(errno.EACCES):
        in_child((work / "shared").read_bytes, uid=AGENT_UID)


def test_utimens_sets_both_times_to_the_nanosecond(work: Path) -> None:
    path = work / "file"
    path.touch()
    os.utime(path, ns=(OLD + 123_456_789, OLD + 987_654_321))
    st = path.stat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (OLD + 123_456_789, OLD + 987_654_321)


def test_utimens_takes_now_and_omit(work: Path) -> None:
    path = work / "file"
    path.touch()
    aged(path)
    utimensat(path, (0, UTIME_OMIT), (0, UTIME_NOW))
    st = path.stat()
    assert st.st_atime_ns == OLD
    assert is_recent(st.st_mtime_ns)
    aged(path)
    utimensat(path, (0, UTIME_NOW), (0, UTIME_OMIT))
    st = path.stat()
    assert is_recent(st.st_atime_ns)
    assert st.st_mtime_ns == OLD


def test_utimens_of_a_symlink_leaves_its_target_alone(work: Path) -> None:
    (work / "file").touch()
    (work / "link").symlink_to("file")
    os.utime(work / "link", ns=(OLD, OLD), follow_symlinks=False)
    assert os.lstat(work / "link").st_mtime_ns == OLD
    assert is_recent((work / "file").stat().st_mtime_ns)


def test_times_before_1970_survive(work: Path) -> None:
    (work / "file").touch()
    os.utime(work / "file", ns=(-5_000_000_000, -1))
    st = (work / "file").stat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (-5_000_000_000, -1)


def test_writing_and_truncating_move_mtime_and_ctime(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    for change in (lambda: path.write_bytes(b"longer"), lambda: os.truncate(path, 1)):
        aged(path)
        before = path.stat().st_ctime_ns
        change()
        st = path.stat()
        assert is_recent(st.st_mtime_ns)
        assert st.st_ctime_ns >= before


def test_chmod_moves_ctime_but_not_mtime(work: Path) -> None:
    path = work / "file"
    path.touch()
    aged(path)
    before = path.stat().st_ctime_ns
    path.chmod(0o600)
    assert path.stat().st_mtime_ns == OLD
    assert path.stat().st_ctime_ns >= before


@pytest.mark.parametrize(
    "kind", ["create", "mkdir", "symlink", "link", "mkfifo", "unlink", "rmdir", "rename"]
)
def test_making_and_removing_names_moves_the_parent_s_mtime(work: Path, kind: str) -> None:
    (work / "file").touch()
    (work / "directory").mkdir()
    aged(work)
    before = work.stat()
    assert before.st_mtime_ns == OLD
    {
        "create": (work / "new").touch,
        "mkdir": (work / "new").mkdir,
        "symlink": lambda: (work / "new").symlink_to("x"),
        "link": lambda: os.link(work / "file", work / "new"),
        "mkfifo": lambda: os.mkfifo(work / "new"),
        "unlink": (work / "file").unlink,
        "rmdir": (work / "directory").rmdir,
        "rename": lambda: os.rename(work / "file", work / "renamed"),
    }[kind]()
    after = work.stat()
    assert is_recent(after.st_mtime_ns)
    assert after.st_ctime_ns >= before.st_ctime_ns


def test_link_counts_follow_every_change(work: Path) -> None:
    path = work / "file"
    path.touch()
    assert path.stat().st_nlink == 1
    os.link(path, work / "second")
    assert path.stat().st_nlink == 2
    os.link(path, work / "third")
    assert (work / "second").stat().st_nlink == 3
    (work / "other").touch()
    os.rename(work / "other", work / "third")
    assert path.stat().st_nlink == 2
    path.unlink()
    assert (work / "second").stat().st_nlink == 1


def test_all_names_of_a_file_show_its_newest_attributes(work: Path) -> None:
    first, second = work / "first", work / "second"
    first.write_bytes(b"x")
    os.link(first, second)
    assert first.stat().st_ino == second.stat().st_ino
    second.write_bytes(b"longer")
    second.chmod(0o600)
    assert first.stat().st_size == 6
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert first.read_bytes() == b"longer"


def test_link_and_unlink_move_ctime(work: Path) -> None:
    path = work / "file"
    path.touch()
    before = path.stat().st_ctime_ns
    for change in (lambda: os.link(path, work / "second"), (work / "second").unlink):
        while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= before:
            pass  # the kernel's clock for files ticks some milliseconds apart
        change()
        now = path.stat().st_ctime_ns
        assert now > before
        before = now


def test_directories_cannot_be_hard_linked(work: Path) -> None:
    (work / "directory").mkdir()
    with refused(errno.EPERM):
        os.link(work / "directory", work / "second")


def test_inode_numbers_are_stable_and_distinct(work: Path) -> None:
    for number in range(200):
        (work / str(number)).touch()
    first = {name: (work / name).stat().st_ino for name in os.listdir(work)}
    assert len(set(first.values())) == 200
    assert {entry.name: entry.inode() for entry in os.scandir(work)} == first


def test_fifos_and_sockets_work_and_pass_data(work: Path) -> None:
    os.mkfifo(work / "fifo")
    assert stat.S_ISFIFO((work / "fifo").stat().st_mode)
    reader = os.open(work / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(work / "fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)
    os.chdir(work)
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("socket")
            assert stat.S_ISSOCK((work / "socket").stat().st_mode)
            server.listen()
            client.connect("socket")
            client.send(b"hello")
            connection, _ = server.accept()
            assert connection.recv(10) == b"hello"
            connection.close()
    finally:
        os.chdir("/")


def test_mknod_makes_regular_files(work: Path) -> None:
    os.mknod(work / "file", 0o640 | stat.S_IFREG)
    assert stat.S_ISREG((work / "file").stat().st_mode)
    (work / "file").write_bytes(b"x")


@pytest.mark.mount
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_devices_are_refused(work: Path, kind: int) -> None:
    with refused(errno.EPERM):
        os.mknod(work / "device", 0o666 | kind, os.makedev(1, 3))


@pytest.mark.mount
def test_extended_attributes_are_said_to_be_unsupported(work: Path) -> None:
    (work / "file").touch()
    with refused(errno.EOPNOTSUPP):
        os.setxattr(work / "file", "user.comment", b"x")
    with refused(errno.EOPNOTSUPP):
        os.getxattr(work / "file", "user.comment")


def test_reading_moves_no_mtime_and_a_listing_neither(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    aged(path)
    aged(work)
    path.read_bytes()
    os.listdir(work)
    assert path.stat().st_mtime_ns == OLD
    assert work.stat().st_mtime_ns == OLD
