"""Real programs doing real work in a home."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from syscalls import in_child

ENVIRONMENT = {
    **os.environ,
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent@localhost",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent@localhost",
}


def run(*command: object, cwd: Path, timeout_s: float = 200, **extra: str) -> str:
    """Run a program and return its output; it must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **extra}, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A git repository of 400 files with some history, on the local disk."""
    top = tmp_path_factory.mktemp("project")
    run("git", "init", "-q", "-b", "main", ".", cwd=top)
    for commit in range(4):
        for number in range(100):
            path = top / f"package{number % 10}" / f"module{commit}_{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"def function_{number}():\n    return {commit * number}\n" * 20)
        (top / "README").write_text(f"commit {commit}\n")
        run("git", "add", "-A", cwd=top)
        run("git", "commit", "-q", "-m", f"commit {commit}", cwd=top)
    yield top


def test_git_clones_commits_branches_and_packs(work: Path, project: Path) -> None:
    run("git", "clone", "-q", project, "clone", cwd=work)
    clone = work / "clone"
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("git", "checkout", "-q", "-b", "feature", cwd=clone)
    (clone / "README").write_text("changed\n")
    (clone / "new").write_text("new\n")
    assert run("git", "status", "--porcelain", cwd=clone) == " M README\n?? new\n"
    run("git", "add", "-A", cwd=clone)
    run("git", "commit", "-q", "-m", "work", cwd=clone)
    run("git", "checkout", "-q", "main", cwd=clone)
    assert not (clone / "new").exists()
    run("git", "merge", "-q", "--no-ff", "-m", "merge", "feature", cwd=clone)
    run("git", "gc", "-q", "--aggressive", "--prune=now", cwd=clone)
    run("git", "fsck", "--strict", "--full", cwd=clone)
    run("git", "stash", "list", cwd=clone)
    run("git", "worktree", "add", "-q", "../second", "feature", cwd=clone)
    assert (work / "second" / "new").read_text() == "new\n"
    assert len(run("git", "log", "--oneline", cwd=clone).splitlines()) == 6


def test_git_refuses_to_write_twice_at_once_but_never_breaks(work: Path) -> None:
    run("git", "init", "-q", ".", cwd=work)
    writers = [
        subprocess.Popen(
            ["sh", "-c", f"for i in 1 2 3 4 5 6; do echo $i > w{n}-$i; git add w{n}-$i; done"],
            cwd=work, env=ENVIRONMENT, stderr=subprocess.DEVNULL,
        )
        for n in range(3)
    ]  # fmt: skip
    for writer in writers:
        writer.wait(60)
    run("git", "add", "-A", cwd=work)
    run("git", "commit", "-q", "-m", "all", cwd=work)
    run("git", "fsck", "--strict", cwd=work)
    assert len(run("git", "ls-files", cwd=work).splitlines()) == 18


SQLITE_WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(int(sys.argv[3])):
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO notes (writer, number) VALUES (?, ?)", (sys.argv[2], number))
    database.execute("UPDATE total SET count = count + 1")
    database.execute("COMMIT")
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_sqlite_with_concurrent_writers_loses_nothing(work: Path, mode: str) -> None:
    path = work / "memory.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
        database.executescript(
            "CREATE TABLE notes (writer, number); CREATE TABLE total (count);INSERT INTO total VALUES (0);"
        )
    count = 150 if mode == "wal" else 40
    writers = [
        subprocess.Popen([sys.executable, "-c", SQLITE_WRITER, str(path), str(n), str(count)])
        for n in range(4)
    ]
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as reader:
        while any(writer.poll() is None for writer in writers):
            notes, total = reader.execute("SELECT (SELECT count(*) FROM notes), count FROM total").fetchone()
            assert notes == total, "a reader saw half a transaction"
    assert [writer.wait() for writer in writers] == [0] * 4
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count FROM total").fetchone() == (4 * count,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_sqlite_shell_reads_what_was_killed_in_the_middle_of_a_transaction(work: Path) -> None:
    path = work / "crash.db"
    run("sqlite3", path, "PRAGMA journal_mode=wal; CREATE TABLE t (x); INSERT INTO t VALUES (1);", cwd=work)
    code = (
        "import sqlite3, sys, os, signal\n"
        "d = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "d.execute('BEGIN'); d.execute('INSERT INTO t VALUES (2)')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert run("sqlite3", path, "SELECT x FROM t; PRAGMA integrity_check;", cwd=work) == "1\nok\n"


def odd_tree(top: Path) -> None:
    """A tree with everything that archives care about."""
    (top / "deep" / "er").mkdir(parents=True)
    (top / "deep" / "er" / "script.sh").write_bytes(b"#!/bin/sh\n")
    (top / "deep" / "er" / "script.sh").chmod(0o755)
    (top / "secret").write_bytes(os.urandom(100_000))
    (top / "secret").chmod(0o600)
    (top / "link").symlink_to("deep/er/script.sh")
    os.link(top / "secret", top / "hard")
    (top / "empty").mkdir(mode=0o2775)
    (top / "empty").chmod(0o2775)
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as file:
        file.truncate(3_000_000)
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(1_600_000_000_000_000_000, 1_500_000_000_000_000_000), follow_symlinks=False)


def look(top: Path) -> dict[str, tuple[object, ...]]:
    seen = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        link = os.readlink(path) if path.is_symlink() else ""
        size = 0 if path.is_dir() else st.st_size
        mtime = 0 if path.is_symlink() else int(st.st_mtime)
        nlink = 0 if path.is_dir() else st.st_nlink
        seen[str(path.relative_to(top))] = (st.st_mode, size, mtime, nlink, st.st_uid, content, link)
    return seen


def test_tar_round_trip_keeps_all_metadata(work: Path, scratch: Path) -> None:
    (scratch / "tree").mkdir()
    odd_tree(scratch / "tree")
    run("tar", "-C", scratch, "-cSpf", scratch / "there.tar", "tree", cwd=scratch)
    run("tar", "-xSpf", scratch / "there.tar", cwd=work)
    assert look(work / "tree") == look(scratch / "tree")
    run("tar", "-cSpzf", work / "back.tgz", "tree", cwd=work)
    (scratch / "back").mkdir()
    run("tar", "-xSpzf", work / "back.tgz", cwd=scratch / "back")
    assert look(scratch / "back" / "tree") == look(scratch / "tree")


def test_rsync_round_trip_keeps_all_metadata(work: Path, scratch: Path) -> None:
    (scratch / "tree").mkdir()
    odd_tree(scratch / "tree")
    run("rsync", "-aHS", f"{scratch}/tree/", f"{work}/tree/", cwd=scratch)
    assert look(work / "tree") == look(scratch / "tree")
    again = run("rsync", "-aHSi", f"{scratch}/tree/", f"{work}/tree/", cwd=scratch)
    assert again == "", f"a second rsync still found differences:\n{again}"
    (scratch / "tree" / "secret").write_bytes(b"n" * 100_000)
    run("rsync", "-aH", "--inplace", "--no-whole-file", f"{scratch}/tree/", f"{work}/tree/", cwd=scratch)
    run("rsync", "-aHS", "--delete", f"{work}/tree/", f"{scratch}/back/", cwd=scratch)
    assert look(scratch / "back") == look(scratch / "tree")


def test_cp_and_mv_keep_metadata_between_home_and_disk(work: Path, scratch: Path) -> None:
    (scratch / "tree").mkdir()
    odd_tree(scratch / "tree")
    expected = look(scratch / "tree")
    run("cp", "-a", scratch / "tree", work / "copy", cwd=work)
    assert look(work / "copy") == expected
    run("mv", work / "copy", scratch / "moved", cwd=work)
    assert look(scratch / "moved") == expected
    assert not (work / "copy").exists()


def make_wheel(directory: Path) -> Path:
    """A small wheel of our own: pip installs it without any index."""
    path = directory / "greeting-1.0-py3-none-any.whl"
    files = {
        "greeting/__init__.py": "def hello():\n    return 'hello from a wheel'\n",
        **{f"greeting/module{number}.py": f"VALUE = {number}\n" for number in range(100)},
        "greeting-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
        "greeting-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",  # noqa: E501
        "greeting-1.0.dist-info/entry_points.txt": "[console_scripts]\ngreet = greeting:hello\n",
    }
    record = "".join(f"{name},,\n" for name in files) + "greeting-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, "greeting-1.0.dist-info/RECORD": record}.items():
            wheel.writestr(name, text)
    return path


def test_a_virtual_environment_is_made_and_pip_installs_and_removes(work: Path, scratch: Path) -> None:
    wheel = make_wheel(scratch)
    run(sys.executable, "-m", "venv", "env", cwd=work)
    python = work / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-index", wheel, cwd=work)
    code = "import greeting, greeting.module7; print(greeting.hello(), greeting.module7.VALUE)"
    assert run(python, "-c", code, cwd=work) == "hello from a wheel 7\n"
    run(*pip, "install", "-q", "--no-index", "--force-reinstall", wheel, cwd=work)
    run(*pip, "uninstall", "-q", "-y", "greeting", cwd=work)
    assert not list((work / "env").rglob("module7.py"))


def test_npm_installs_a_tree_of_local_packages_and_runs_a_script(work: Path, scratch: Path) -> None:
    for number in range(30):
        package = scratch / f"package{number}"
        package.mkdir()
        manifest = {
            "name": f"package{number}",
            "version": "1.0.0",
            "main": "index.js",
            "bin": f"cli{number}.js",
        }
        (package / "package.json").write_text(json.dumps(manifest))
        (package / "index.js").write_text(f"module.exports = {number};\n")
        (package / f"cli{number}.js").write_text("#!/usr/bin/env node\nconsole.log('cli');\n")
        with tarfile.open(scratch / f"package{number}.tgz", "w:gz") as archive:
            archive.add(package, "package")
    project = work / "project"
    project.mkdir()
    dependencies = {f"package{number}": f"file:{scratch}/package{number}.tgz" for number in range(30)}
    program = "let s=0; for (let i=0;i<30;i++) s+=require('package'+i); console.log(s)"
    scripts = {"sum": f'node -e "{program}"'}
    manifest = {"name": "project", "version": "1.0.0", "dependencies": dependencies, "scripts": scripts}
    (project / "package.json").write_text(json.dumps(manifest))
    quiet = ("--offline", "--no-audit", "--no-fund", "--no-update-notifier", "--cache", work / "cache")
    run("npm", "install", *quiet, cwd=project)
    assert run("npm", "run", "-s", "sum", *quiet, cwd=project) == "435\n"
    assert (project / "node_modules" / ".bin" / "package3").is_symlink()
    run("npm", "ci", *quiet, cwd=project)
    assert run("npm", "run", "-s", "sum", *quiet, cwd=project) == "435\n"


def test_gcc_compiles_links_and_the_program_runs(work: Path) -> None:
    for number in range(10):
        (work / f"part{number}.c").write_text(f"int part{number}(void) {{ return {number}; }}\n")
    declarations = "".join(f"int part{number}(void);\n" for number in range(10))
    total = "+".join(f"part{number}()" for number in range(10))
    (work / "main.c").write_text(
        f'#include <stdio.h>\n{declarations}int main(void) {{ printf("%d\\n", {total}); return 0; }}\n'
    )
    run("gcc", "-O2", "-g", "-c", "-fPIC", *sorted(work.glob("*.c")), cwd=work)
    run("ar", "rcs", "libparts.a", *sorted(work.glob("part*.o")), cwd=work)
    run("gcc", "-flto", "-o", "program", "main.o", "libparts.a", cwd=work)
    assert run(work / "program", cwd=work) == "45\n"
    run("gcc", "-shared", "-o", "libparts.so", *sorted(work.glob("part*.o")), cwd=work)
    run("strip", "program", cwd=work)
    assert run(work / "program", cwd=work) == "45\n"


def test_ripgrep_and_find_see_every_file(work: Path, project: Path) -> None:
    shutil.copytree(project, work / "copy", symlinks=True)
    found = run("rg", "--count-matches", "function_42", cwd=work / "copy").splitlines()
    assert len(found) == 4
    assert all(line.endswith(":20") for line in found)
    assert len(run("find", ".", "-name", "*.py", cwd=work / "copy").splitlines()) == 400
    assert int(run("sh", "-c", "cat package*/*.py | wc -l", cwd=work / "copy")) == 400 * 40


def test_an_editor_saves_by_backup_write_and_rename(work: Path) -> None:
    path = work / "document.txt"
    path.write_text("version 0\n")
    path.chmod(0o640)
    for version in range(1, 30):
        watcher = path.open()
        os.link(path, work / "document.txt~new")
        os.rename(work / "document.txt~new", work / "document.txt~")
        with (work / ".document.txt.swp").open("w") as swap:
            swap.write(f"version {version}\n")
            swap.flush()
            os.fsync(swap.fileno())
        shutil.copymode(path, work / ".document.txt.swp")
        os.rename(work / ".document.txt.swp", path)
        assert path.read_text() == f"version {version}\n"
        assert (work / "document.txt~").read_text() == f"version {version - 1}\n"
        assert watcher.read() == f"version {version - 1}\n"
        watcher.close()
    assert path.stat().st_mode & 0o777 == 0o640


def test_sed_in_place_patch_and_sort_onto_the_same_file(work: Path) -> None:
    (work / "list").write_text("pear\napple\nfig\n")
    run("sed", "-i", "s/pear/plum/", "list", cwd=work)
    run("sort", "-o", "list", "list", cwd=work)
    assert (work / "list").read_text() == "apple\nfig\nplum\n"
    (work / "change.diff").write_text("--- list\n+++ list\n@@ -1,2 +1,3 @@\n apple\n+banana\n fig\n")
    run("git", "apply", "--unsafe-paths", "change.diff", cwd=work, GIT_DIR="/nonexistent")
    assert (work / "list").read_text() == "apple\nbanana\nfig\nplum\n"


def test_a_browser_s_download_appears_whole_under_its_final_name(work: Path) -> None:
    partial, final = work / "Unconfirmed 1234.crdownload", work / "report.pdf"
    final.touch()  # Chromium takes the name first
    with partial.open("wb") as download:
        for _ in range(50):
            download.write(os.urandom(64 * 1024))
            download.flush()
    expected = hashlib.sha256(partial.read_bytes()).hexdigest()
    os.rename(partial, final)
    assert os.listdir(work) == ["report.pdf"]
    assert hashlib.sha256(final.read_bytes()).hexdigest() == expected


MAPPED_WRITER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
    for offset in range(int(sys.argv[2]), len(mapping), 4):
        mapping[offset] = int(sys.argv[2]) + 1
    mapping.flush()
"""


def test_processes_writing_one_mapped_file_together_lose_nothing(work: Path) -> None:
    path = work / "mapped"
    path.write_bytes(bytes(400_000))
    writers = [subprocess.Popen([sys.executable, "-c", MAPPED_WRITER, str(path), str(n)]) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert path.read_bytes() == bytes([1, 2, 3, 4]) * 100_000


def test_an_agent_works_as_its_own_user(work: Path) -> None:
    work.chmod(0o777)

    def agent() -> str:
        os.environ["HOME"] = str(work)
        run("git", "init", "-q", "mine", cwd=work)
        (work / "mine" / "file").write_text("x")
        run("git", "add", "-A", cwd=work / "mine")
        run("git", "commit", "-q", "-m", "mine", cwd=work / "mine")
        return run("git", "log", "--format=%s", cwd=work / "mine")

    assert in_child(agent, uid=4242) == "mine\n"


def test_shutil_and_tempfile_behave(work: Path) -> None:
    code = (
        "import os, shutil, sys, tempfile\n"
        "with tempfile.TemporaryDirectory(dir='.') as d, tempfile.TemporaryFile(dir=d) as f:\n"
        "    f.write(b'x' * 100000); f.seek(0); assert len(f.read()) == 100000\n"
        "    shutil.copytree(os.path.dirname(os.__file__) + '/json', d + '/json')\n"
        "    shutil.make_archive(d + '/archive', 'zip', d + '/json')\n"
        "    shutil.unpack_archive(d + '/archive.zip', d + '/again')\n"
        "    assert sorted(os.listdir(d + '/json')) == sorted(os.listdir(d + '/again'))\n"
        "print(shutil.disk_usage('.').free > 0, os.listdir('.'))\n"
    )
    assert run(sys.executable, "-c", code, cwd=work) == "True []\n"
