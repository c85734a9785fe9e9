"""What processes share: mappings and locks."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from syscalls import in_child, refused


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Another process, spoken with line by line."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_shared_mapping_is_seen_by_another_process(work: Path) -> None:
    path = work / "shared"
    path.write_bytes(bytes(8192))
    other = python(
        "import mmap, sys\n"
        "f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 8192)\n"
        "print('mapped'); sys.stdin.readline()\n"
        "print(bytes(m[4096:4101]).decode()); m[0:5] = b'reply'; print('done')",
        path,
    )
    assert other.stdin and other.stdout
    assert other.stdout.readline() == "mapped\n"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[4096:4101] = b"hello"
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "hello\n"
        assert other.stdout.readline() == "done\n"
        assert mapping[0:5] == b"reply"
    assert other.wait() == 0


def test_what_was_written_through_a_mapping_is_on_disk_after_close(work: Path) -> None:
    path = work / "mapped"
    path.write_bytes(bytes(1_000_000))

    def child() -> None:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            for offset in range(0, 1_000_000, 4096):
                mapping[offset] = 7
            mapping.flush()

    in_child(child)
    data = path.read_bytes()
    assert data[::4096] == b"\7" * len(data[::4096])


def test_write_is_seen_through_a_mapping_and_the_other_way_round(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"a" * 4096)

    def child() -> tuple[bytes, bytes]:
        with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 4096) as mapping:
            file.write(b"written")
            through_mapping = mapping[:7]
            mapping[10:16] = b"mapped"
            return through_mapping, os.pread(file.fileno(), 6, 10)

    assert in_child(child) == (b"written", b"mapped")


def test_private_mapping_changes_nothing(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"a" * 4096)

    def child() -> bytes:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE) as mapping:
            mapping[0:1] = b"b"
            return mapping[:2]

    assert in_child(child) == b"ba"
    assert path.read_bytes() == b"a" * 4096


def test_a_mapping_outlives_close_and_unlink(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 4096)

    def child() -> bytes:
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 4096)
        path.unlink()
        mapping[1:2] = b"y"
        return mapping[:3]

    assert in_child(child) == b"xyx"


def test_a_program_on_the_mount_can_be_run(work: Path) -> None:
    script = work / "hello"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "hello\n"
    binary = work / "true"
    binary.write_bytes(Path("/bin/true").read_bytes())
    binary.chmod(0o755)
    assert subprocess.run([binary], check=False).returncode == 0


HOLD = """
import fcntl, sys
f = open(sys.argv[1], 'r+b')
exec(sys.argv[2])
print('locked'); sys.stdin.readline()
"""


@pytest.mark.parametrize("lock", ["flock", "lockf"])
def test_exclusive_locks_hold_between_processes_and_end_with_them(work: Path, lock: str) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 100)
    holder = python(HOLD, path, f"fcntl.{lock}(f, fcntl.LOCK_EX)")
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == "locked\n"
    take = getattr(fcntl, lock)
    with path.open("r+b") as file:
        with refused(errno.EAGAIN, errno.EACCES):
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with refused(errno.EAGAIN, errno.EACCES):
            take(file, fcntl.LOCK_SH | fcntl.LOCK_NB) if lock == "flock" else take(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0
            )
        holder.kill()
        holder.wait()
        take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_byte_range_locks_do_not_overlap_elsewhere(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 100)
    holder = python(HOLD, path, "fcntl.lockf(f, fcntl.LOCK_EX, 10, 0)")
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == "locked\n"
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
        with refused(errno.EAGAIN, errno.EACCES):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
    holder.communicate("\n")


def test_shared_locks_are_shared(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    holder = python(HOLD, path, "fcntl.flock(f, fcntl.LOCK_SH)")
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == "locked\n"
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with refused(errno.EAGAIN):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.communicate("\n")


def test_a_blocked_lock_is_granted_when_the_holder_unlocks(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        waiter = python(
            "import fcntl, sys\nf = open(sys.argv[1], 'r+b')\nprint('waiting')\n"
            "fcntl.lockf(f, fcntl.LOCK_EX)\nprint('granted')",
            path,
        )
        assert waiter.stdout
        assert waiter.stdout.readline() == "waiting\n"
        fcntl.lockf(file, fcntl.LOCK_UN)
        assert waiter.stdout.readline() == "granted\n"
    assert waiter.wait() == 0


def test_closing_one_descriptor_keeps_the_flock_of_another(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    first, second = path.open("r+b"), path.open("r+b")
    fcntl.flock(first, fcntl.LOCK_EX)
    with refused(errno.EAGAIN):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second.close()
    with path.open("r+b") as third, refused(errno.EAGAIN):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.close()


def test_a_writer_in_one_process_is_seen_at_once_by_a_reader_in_another(work: Path) -> None:
    path = work / "log"
    path.touch()
    reader = python(
        "import sys\nf = open(sys.argv[1])\nprint('open')\n"
        "for _ in range(100):\n    sys.stdin.readline(); print(f.readline().strip())",
        path,
    )
    assert reader.stdin and reader.stdout
    assert reader.stdout.readline() == "open\n"
    with path.open("a") as writer:
        for number in range(100):
            print(f"line {number}", file=writer, flush=True)
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"line {number}\n"
    assert reader.wait() == 0
