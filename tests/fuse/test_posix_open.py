"""open(2) with every flag, and what may be done with the descriptor."""

import errno
import mmap
import os
import resource
import stat
from pathlib import Path

import pytest
from syscalls import fallocate, in_child, refused


def test_unlinked_file_lives_until_its_last_close(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"still here")
    with path.open("r+b") as handle:
        path.unlink()
        assert not path.exists()
        assert handle.read() == b"still here"
        handle.write(b", and writable")
        handle.flush()
        st = os.fstat(handle.fileno())
        assert (st.st_nlink, st.st_size) == (0, 24)
        handle.truncate(5)
        assert os.fstat(handle.fileno()).st_size == 5
        os.fchmod(handle.fileno(), 0o600)
        assert stat.S_IMODE(os.fstat(handle.fileno()).st_mode) == 0o600
        os.fsync(handle.fileno())


def test_name_of_an_unlinked_open_file_can_be_taken_again(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"first")
    with path.open("rb") as first:
        path.unlink()
        path.write_bytes(b"second")
        assert first.read() == b"first"
        assert path.read_bytes() == b"second"
        assert os.fstat(first.fileno()).st_ino != path.stat().st_ino


def test_unlinked_open_file_can_be_opened_again_through_proc(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"hidden")
    with path.open("rb") as handle:
        path.unlink()
        assert Path(f"/proc/self/fd/{handle.fileno()}").read_bytes() == b"hidden"


def test_append_goes_to_the_end_whatever_the_offset(work: Path) -> None:
    path = work / "log"
    path.write_bytes(b"one\n")
    first = os.open(path, os.O_WRONLY | os.O_APPEND)
    second = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(first, b"two\n")
    os.write(second, b"three\n")
    os.lseek(first, 0, os.SEEK_SET)
    os.write(first, b"four\n")
    os.close(first)
    os.close(second)
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_appenders_in_two_processes_lose_nothing(work: Path) -> None:
    path = work / "log"

    def append(letter: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for _ in range(500):
            os.write(handle, letter * 9 + b"\n")
        os.close(handle)

    children = []
    for letter in (b"a", b"b"):
        pid = os.fork()
        if pid == 0:
            append(letter)
            os._exit(0)
        children.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    lines = path.read_bytes().splitlines()
    assert sorted(set(lines)) == [b"a" * 9, b"b" * 9]
    assert len(lines) == 1000


def test_trunc_empties_and_sets_mtime(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(1, 1))
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0
    assert path.stat().st_mtime_ns > 1


def test_excl_refuses_what_exists_dangling_symlinks_included(work: Path) -> None:
    (work / "file").touch()
    (work / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with refused(errno.EEXIST):
            os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_create_through_a_dangling_symlink_makes_its_target(work: Path) -> None:
    (work / "link").symlink_to("target")
    (work / "link").write_bytes(b"x")
    assert (work / "target").read_bytes() == b"x"


def test_exclusive_create_by_many_processes_has_one_winner(work: Path) -> None:
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                os.open(work / "lock", os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] + [1] * 7


def test_direct_io_is_accepted(work: Path) -> None:
    buffer = mmap.mmap(-1, 8192)
    buffer.write(b"d" * 8192)
    handle = os.open(work / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        assert os.write(handle, buffer) == 8192
        target = mmap.mmap(-1, 8192)
        assert os.preadv(handle, [target], 0) == 8192
        assert target[:] == b"d" * 8192
    finally:
        os.close(handle)
    assert (work / "direct").read_bytes() == b"d" * 8192


def test_direct_and_buffered_descriptors_see_each_other(work: Path) -> None:
    path = work / "both"
    path.write_bytes(b"a" * 4096)
    assert path.read_bytes() == b"a" * 4096
    block = mmap.mmap(-1, 4096)
    block.write(b"b" * 4096)
    handle = os.open(path, os.O_WRONLY | os.O_DIRECT)
    os.write(handle, block)
    os.close(handle)
    assert path.read_bytes() == b"b" * 4096


@pytest.mark.mount
def test_nameless_temporary_files_are_said_to_be_unsupported(work: Path) -> None:
    with refused(errno.EOPNOTSUPP, errno.EISDIR):
        os.open(work, os.O_TMPFILE | os.O_RDWR, 0o600)


@pytest.mark.mount
def test_fallocate_is_said_to_be_unsupported_and_the_emulation_works(work: Path) -> None:
    with (work / "file").open("wb") as handle:
        with refused(errno.EOPNOTSUPP):
            fallocate(handle.fileno(), 0, 0, 4096)
        os.posix_fallocate(handle.fileno(), 0, 65536)
        assert os.fstat(handle.fileno()).st_size == 65536


def test_sparse_file_reads_zeros_and_keeps_its_logical_size(work: Path) -> None:
    path = work / "sparse"
    with path.open("wb") as handle:
        handle.seek(5_000_000)
        handle.write(b"end")
    assert path.stat().st_size == 5_000_003
    assert path.stat().st_blocks * 512 < 1_000_000
    with path.open("rb") as handle:
        assert handle.read(100) == bytes(100)
        handle.seek(4_999_998)
        assert handle.read() == b"\0\0end"


def test_seek_hole_and_seek_data_answer_within_the_file(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 10_000)
    with path.open("rb") as handle:
        assert os.lseek(handle.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(handle.fileno(), 0, os.SEEK_HOLE) == 10_000
        with refused(errno.ENXIO):
            os.lseek(handle.fileno(), 10_000, os.SEEK_DATA)


def test_read_beyond_the_end_is_empty_and_extended_bytes_are_zero(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"abc")
    with path.open("r+b") as handle:
        assert os.pread(handle.fileno(), 10, 3) == b""
        handle.truncate(2)
        handle.truncate(6)
        assert os.pread(handle.fileno(), 10, 0) == b"ab\0\0\0\0"


def test_truncate_by_path_is_seen_by_an_open_reader(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x" * 10_000)
    with path.open("rb") as handle:
        assert len(handle.read()) == 10_000
        os.truncate(path, 10)
        handle.seek(0)
        assert len(handle.read()) == 10


def test_absurd_sizes_are_efbig(work: Path) -> None:
    path = work / "file"
    path.touch()
    with refused(errno.EFBIG):
        os.truncate(path, 2**62)
    with path.open("r+b") as handle, refused(errno.EFBIG, errno.EINVAL):
        os.pwrite(handle.fileno(), b"x", 2**63 - 2)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_a_directory_cannot_be_opened_for_writing(work: Path, flags: int) -> None:
    with refused(errno.EISDIR):
        os.open(work, flags)


def test_directory_flag_refuses_files_and_nofollow_refuses_symlinks(work: Path) -> None:
    (work / "file").touch()
    (work / "link").symlink_to("file")
    with refused(errno.ENOTDIR):
        os.open(work / "file", os.O_RDONLY | os.O_DIRECTORY)
    with refused(errno.ELOOP):
        os.open(work / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_writing_to_a_read_only_descriptor_is_ebadf(work: Path) -> None:
    (work / "file").write_bytes(b"x")
    handle = os.open(work / "file", os.O_RDONLY)
    other = os.open(work / "file", os.O_RDWR)
    with refused(errno.EBADF):
        os.write(handle, b"y")
    os.close(handle)
    os.close(other)


def test_a_file_made_read_only_is_still_written_through_its_first_descriptor(work: Path) -> None:
    def child() -> bytes:
        handle = os.open(work / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400)
        os.write(handle, b"git does this")
        os.close(handle)
        return (work / "file").read_bytes()

    work.chmod(0o777)
    uid = 4242 if os.geteuid() == 0 else None
    assert in_child(child, uid=uid) == b"git does this"


def test_thousands_of_opens_of_one_file_are_served(work: Path) -> None:
    path = work / "popular"
    path.write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(3000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 200), hard))
    try:
        handles = [os.open(path, os.O_RDONLY) for _ in range(count)]
        assert os.pread(handles[-1], 1, 0) == b"x"
        for handle in handles:
            os.close(handle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_fsync_and_fdatasync_of_files_and_directories(work: Path) -> None:
    with (work / "file").open("wb") as handle:
        handle.write(b"x")
        handle.flush()
        os.fsync(handle.fileno())
        os.fdatasync(handle.fileno())
    directory = os.open(work, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def test_one_file_is_written_and_read_in_pieces_of_every_size(work: Path) -> None:
    path = work / "pieces"
    expected = bytearray()
    with path.open("wb", buffering=0) as handle:
        for size in (1, 511, 512, 4095, 4096, 4097, 65_537, 1_048_576, 1_048_577, 3_000_000):
            piece = bytes([size % 251]) * size
            assert handle.write(piece) == size
            expected += piece
    assert path.read_bytes() == expected
    with path.open("rb", buffering=0) as handle:
        assert os.pread(handle.fileno(), 100_000, 4000) == expected[4000:104_000]
