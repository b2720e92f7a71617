"""The works whose time is taken, in groups that build on one another's files.

A group prepares, then yields the name of a work and what is to be timed: once per folder of the
live tree, or once in all where it only "reads". A work that returns seconds has taken its own time:
starting the program would be most of it.
"""

import json
import pathlib
import shutil
import sqlite3
import time

from bench_live import SNAPSHOT, tree_size
from bench_place import Failure, run
from bench_work import MIB, Tree, dice

READS = "find {} -type f -print0 | xargs -0 cat >/dev/null"


def shell(text, cwd):
    """A pipeline, of which every part must succeed."""
    run("bash", "-o", "pipefail", "-ec", text, cwd=cwd)


def drop_caches(live, sources):
    """What is read next comes from the images; the programs that read it are in memory again."""
    live.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    sources.load_programs()


class Sizes:
    """How much work there is."""

    def __init__(self, quick, files=None, mib=None):
        self.files = files or (1500 if quick else 6000)
        self.many_files = 0 if quick or files else 20000
        self.mib = mib or (96 if quick else 512)
        self.overwrite_mib = mib or (128 if quick else 1024)
        self.random_ios = 4000 if quick or mib else 25000
        self.syncs = 300 if quick or mib else 2000
        self.transactions = 150 if quick or mib else 1000

    def image_bytes(self):
        """Room for the largest group and its history, in a sparse image."""
        return (4 * self.overwrite_mib + 2048) * MIB


class Sources:
    """What is copied from: made once, in memory."""

    def __init__(self, folder, sizes, groups):
        self.folder, self.sizes = folder, sizes
        folder.mkdir()
        self._small()
        self._tar(sizes.files)
        if sizes.many_files and "many" in groups:
            self._tar(sizes.many_files)
        if "git" in groups:
            self._repository()

    def tar(self, files):
        """An archive of so many files."""
        return self.folder / f"{files}.tar"

    def _small(self):
        """What programs are tried on."""
        small = self.folder / "small"
        small.mkdir()
        run("git", "init", "-q", small)
        (small / "file").write_text("small\n", encoding="ascii")

    def load_programs(self):
        """Reads the programs of the works from their disk, as far as running them does."""
        for text in ("git status", "ls -lR .", READS.format("."), "cp -a . ../copy",
                     "dd if=file of=../copy/file bs=1M", "rm -rf ../copy"):
            shell(f"({text}) >/dev/null 2>&1", self.folder / "small")

    def _tar(self, files):
        """Small files as in source trees: a few hundred bytes to 16 KiB, 20 to a directory."""
        chance, root = dice("tar", files), self.folder / "tar"
        for number in range(files):
            path = root / f"part{number // 400:02}" / f"dir{number // 20:04}" / f"file{number:05}.c"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(chance.choice((300, 900, 2000, 4000, 9000, 16000))))
        run("tar", "-cf", self.tar(files), "-C", root, ".")
        shutil.rmtree(root)

    def _repository(self):
        """Two commits that differ in a fifth of the files."""
        tree, work = self.folder / "tree", Tree(2, self.sizes.files)
        tree.mkdir()
        work.prepare(tree)
        environment = {f"GIT_{who}_{what}": "bench@example.org"
                       for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        top = tree / "sources"
        git = lambda *words: run("git", *words, cwd=top, env=environment)
        git("init", "-q", "-b", "main")
        for text in ("one", "two"):
            git("add", "-A")
            git("commit", "-q", "-m", text)
            if text == "one":
                for path in sorted(top.rglob("*"))[::5]:
                    if path.is_file() and ".git" not in path.parts:
                        path.write_bytes(path.read_bytes() + b"// more\n")
        git("clone", "-q", "--bare", top, self.folder / "origin.git")
        shutil.rmtree(tree)


def tree_group(live, sources, sizes):
    """A tree of small files comes, is copied, looked at, read and removed."""
    def untar(folder):
        (folder / "one").mkdir()
        run("tar", "-xf", sources.tar(sizes.files), "-C", folder / "one")

    yield "untar", untar
    for folder in live.folders:
        if tree_size(folder / "one") <= sizes.files:
            raise Failure(f"the archive did not arrive in {folder}")
    yield "cp -a", lambda folder: run("cp", "-a", "one", "two", cwd=folder)
    first = live.folders[0]
    for name, command in (("ls -lR", "ls -lR one >/dev/null"), ("find", "find one >/dev/null"),
                          ("read all", READS.format("one"))):
        drop_caches(live, sources)
        yield f"{name}, cold", lambda _, command=command: shell(command, first), "reads"
        yield f"{name}, warm", lambda _, command=command: shell(command, first), "reads"
    yield "rm -rf", lambda folder: run("rm", "-rf", "one", "two", cwd=folder)
    for folder in live.folders:
        if tree_size(folder):
            raise Failure(f"something is left in {folder}")


def many_group(live, sources, sizes):
    """More of the same."""
    if not sizes.many_files:
        return
    run_tar = lambda folder: run("tar", "-xf", sources.tar(sizes.many_files), "-C", folder)
    yield "untar, many", run_tar
    yield "rm -rf, many", lambda folder: shell("rm -rf part*", folder)


def git_group(live, sources, sizes):
    """A repository is cloned and worked with."""
    origin = sources.folder / "origin.git"
    clone = lambda folder: run("git", "clone", "-q", "--no-hardlinks", origin, folder / "clone")
    git = lambda folder, *words: run("git", *words, cwd=folder / "clone")
    yield "git clone", clone

    def clean(folder):
        if git(folder, "status", "--porcelain"):
            raise Failure("the clone is not clean")

    drop_caches(live, sources)
    yield "git status, cold", lambda _: clean(live.folders[0]), "reads"
    yield "git status, warm", lambda _: clean(live.folders[0]), "reads"
    yield "git checkout", lambda folder: git(folder, "checkout", "-q", "HEAD~1")


def stream_group(live, sources, sizes):
    """A large file is written and read, and overwritten where a snapshot holds it."""
    first = live.folders[0]

    def write(name, mib, *options):
        return lambda folder: run("dd", "if=/dev/zero", f"of={folder}/{name}", "bs=1M",
                                  f"count={mib}", *options)

    yield "write", write("plain", sizes.mib)
    live.sync()
    for folder in live.folders:
        (folder / "plain").unlink()
    live.settle()
    yield "write, fsync", write("synced", sizes.mib, "conv=fsync")
    drop_caches(live, sources)
    read = lambda _: run("dd", f"if={first}/synced", "of=/dev/null", "bs=1M")
    yield "read, cold", read, "reads"
    yield "read, warm", read, "reads"
    for folder in live.folders:
        (folder / "synced").unlink()
        write("held", sizes.overwrite_mib, "conv=fsync")(folder)
    live.snapshot("held")
    yield "overwrite, fsync", write("held", sizes.overwrite_mib, "conv=notrunc,fsync")


def fio(folder, name, mode, jobs, sizes, ios, *options):
    """Runs fio and returns its own time: starting it takes longer than some of the work."""
    told = json.loads(run(
        "fio", f"--name={name}", f"--directory={folder}", "--filename=data", f"--rw={mode}",
        "--bs=4k", f"--size={sizes.mib // 2}M", "--ioengine=psync", f"--numjobs={jobs}",
        f"--io_size={ios // jobs * 4096}", "--norandommap", "--randseed=20261122",
        "--allow_file_create=0",
        "--group_reporting", "--output-format=json", *options,
    ))
    way = told["jobs"][0]["write" if "write" in mode else "read"]
    if way["total_ios"] < ios // jobs * jobs:
        raise Failure(f"fio did {way['total_ios']} of {ios} transfers")
    return way["runtime"] / 1000


def random_group(live, sources, sizes):
    """4 KiB at random places of a file, and small writes that must be durable."""
    first = live.folders[0]
    for folder in live.folders:
        run("dd", "if=/dev/urandom", f"of={folder}/data", "bs=1M", f"count={sizes.mib // 2}",
            "conv=fsync")
    for jobs in (1, 4):
        drop_caches(live, sources)
        read = lambda _, jobs=jobs: fio(first, "r", "randread", jobs, sizes, sizes.random_ios)
        yield f"random read, {jobs}", read, "reads"
    # Its blocks are held by a snapshot: the first write to each has to keep what was there.
    for jobs in (1, 4):
        live.snapshot(f"random{jobs}")
        write = lambda folder, jobs=jobs: fio(
            folder, "w", "randwrite", jobs, sizes, sizes.random_ios)
        yield f"random write, {jobs}", write
    sync = lambda folder: fio(folder, "s", "write", 1, sizes, sizes.syncs, "--fsync=1")
    yield "write 4k + fsync", sync
    yield "sqlite", lambda folder: transactions(folder, sizes.transactions)


def transactions(folder, count):
    """So many small transactions, each durable, in the default journal mode."""
    connection = sqlite3.connect(folder / "data.sqlite", isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, at INT, text TEXT)")
    start = time.monotonic()
    for number in range(count):
        connection.execute("INSERT INTO t (at, text) VALUES (?, ?)", (number, "x" * 120))
    spent = time.monotonic() - start
    found = connection.execute("SELECT count(*) FROM t").fetchone()[0]
    connection.close()
    if found != count:
        raise Failure(f"the database has {found} rows, not {count}")
    return spent


def past_group(live, sources, sizes):
    """A tree is held by a snapshot, then all of it is saved anew, and the snapshot is browsed."""
    for folder in live.folders:
        (folder / "tree").mkdir()
        run("tar", "-xf", sources.tar(sizes.files), "-C", folder / "tree")
    live.sync()
    has_snapshots = live.name.startswith(("btrfs", "rearview"))
    is_floor = live.name.startswith("floor")
    if has_snapshots:
        yield "snapshot create", lambda _: live.snapshot(SNAPSHOT), "reads"
    elif not is_floor and live.snapshot(SNAPSHOT) is None:
        return
    live_tree = live.folders[0] / "tree"
    aim = sources.folder / "out"

    def copied(tree):
        shutil.rmtree(aim, ignore_errors=True)
        drop_caches(live, sources)
        return lambda _: run("cp", "-a", tree, aim)

    if has_snapshots or is_floor:
        yield "cp -a out of the live tree", copied(live_tree), "reads"
    if is_floor:
        return
    if has_snapshots:
        # Every file gets other bytes, so that what the snapshot shows has to be kept apart.
        shell("find tree -type f -print0 | xargs -0 sed -i 1iother", live.folders[0])
        live.settle()
    old = live.past(SNAPSHOT)
    old = old / "tree"
    drop_caches(live, sources)
    yield "ls -lR of a snapshot", lambda _: run("ls", "-lR", old), "reads"
    yield "cp -a out of a snapshot", copied(old), "reads"
    if tree_size(aim) <= sizes.files:
        raise Failure("the copy of the snapshot lacks files")
    run("tar", "-df", sources.tar(sizes.files), "-C", aim, ".")
    shutil.rmtree(aim)


GROUPS = {
    "tree": tree_group,
    "many": many_group,
    "git": git_group,
    "stream": stream_group,
    "random": random_group,
    "past": past_group,
}
