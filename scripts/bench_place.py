"""A scratch folder with images and mounts that are taken down whatever happens, and commands.

What is mounted is read from the kernel's table, never remembered: so the same sweep cleans up
after ourselves, after Ctrl-C, and after an earlier run that was killed.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

REARVIEW = os.environ.get("REARVIEW", "rearview")
OWNED = ".rearview-bench"


class Failure(Exception):
    """What could not be measured, and why, as a sentence for people."""


def say(text):
    """Progress goes to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


def chosen(asked, known, what):
    """Those of a comma-separated list, all if none is given."""
    names = asked.split(",") if asked else list(known)
    for name in names:
        if name not in known:
            raise Failure(f"no {what} is called '{name}': there are {', '.join(known)}")
    return names


def run(*command, cwd=None, env=None, accept=(0,)):
    """Runs a command and returns its output; every other exit code is a Failure.

    The output goes through files: a daemon that the command leaves behind would keep a pipe open.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "LC_ALL": "C", **(env or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(
                words,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                check=False,
            ).returncode
        except OSError as error:
            raise Failure(f"{words[0]} cannot be run: {error}") from error
        out.seek(0)
        errors.seek(0)
        text = out.read().decode(errors="replace")
        if code not in accept:
            told = (errors.read().decode(errors="replace") or text).strip().splitlines()[-3:]
            raise Failure(f"'{' '.join(words)}' ended with {code}: {' / '.join(told)}")
        return text


def mounts():
    """(mountpoint, type, source) of all mounts, in the order they were made."""
    found = []
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        kind, source = after.split()[:2]
        found.append((pathlib.Path(point), kind, source))
    return found


def must_be_mounted(path, kind):
    """Numbers of a filesystem that is not there would be those of the folder below it."""
    kinds = [known for point, known, _ in mounts() if point == path.resolve()]
    if not kinds or kinds[-1] != kind:
        raise Failure(f"{path} should be a mount of {kind}, but is {kinds[-1:] or 'not mounted'}")


def used_bytes(path):
    """Bytes in use of the filesystem at `path`, as statvfs tells."""
    numbers = os.statvfs(path)
    return (numbers.f_blocks - numbers.f_bfree) * numbers.f_frsize


def tree_bytes(path):
    """(allocated, apparent) bytes of all files and directories below; hard links count once."""
    allocated = apparent = 0
    seen = set()
    waiting = [str(path)]
    while waiting:
        name = waiting.pop()
        try:
            facts = os.lstat(name)
            inside = os.scandir(name) if stat.S_ISDIR(facts.st_mode) else None
        except FileNotFoundError:
            # The tree may be in use: what goes while we look is not there.
            continue
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        allocated += facts.st_blocks * 512
        if inside is not None:
            waiting.extend(entry.path for entry in inside)
        else:
            apparent += facts.st_size
    return allocated, apparent


def must_be_equal(one, other, *without):
    """Compares two trees byte by byte and name by name."""
    options = [word for name in without for word in ("-x", name)]
    run("diff", "-rq", "--no-dereference", *options, one, other)


class Place:
    """A folder that is ours alone while we run, with everything that is mounted below it."""

    def __init__(self, path):
        self.path = path.resolve()
        self._lock = None

    def __enter__(self):
        owned = self.path / OWNED
        if any(point == self.path for point, _, _ in mounts()):
            raise Failure(f"{self.path} is a mount, which is not ours to end: name a folder in it")
        if self.path.exists() and any(self.path.iterdir()) and not owned.exists():
            raise Failure(f"{self.path} holds files that are not ours: name another --scratch")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(owned, "w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = f"{self.path} is in use by another run: name another --scratch"
            raise Failure(told) from error
        # Ours from here on, whatever a killed run left.
        self.clear(self.path)
        return self

    def __exit__(self, *_):
        with undisturbed():
            self.clear(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()

    def must_have_room(self, needed):
        """Images are sparse: a full disk below them would be met in the middle of a run."""
        numbers = os.statvfs(self.path)
        free = numbers.f_bavail * numbers.f_frsize
        if free < needed:
            told = f"{self.path} has {free >> 20} MiB free, {needed >> 20} MiB are needed"
            raise Failure(f"{told}: name another --scratch")

    def clear(self, folder):
        """Unmounts all below `folder`, detaches its loop devices, deletes what is in it."""
        with undisturbed():
            stuck = self._unmount(folder)
            stuck += self._detach(folder)
            if stuck:
                raise Failure("; ".join(stuck))
            for entry in folder.iterdir() if folder.exists() else ():
                if entry == self.path / OWNED:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    @staticmethod
    def _unmount(folder):
        stuck = []
        for point, kind, _ in reversed(mounts()):
            if point != folder and folder not in point.parents:
                continue
            command = [REARVIEW, "umount"] if kind == "fuse.rearview" else ["umount"]
            try:
                run(*command, point)
            except Failure as failure:
                say(f"bench: {failure}; detaching it")
                try:
                    run("umount", "-l", point)
                except Failure as worse:
                    stuck.append(str(worse))
        return stuck

    @staticmethod
    def _detach(folder):
        stuck = []
        for line in run("losetup", "-l", "-n", "-O", "NAME,BACK-FILE").splitlines():
            name, _, image = line.strip().partition(" ")
            if folder in pathlib.Path(image.strip().removesuffix(" (deleted)")).parents:
                try:
                    run("losetup", "-d", name)
                except Failure as failure:
                    stuck.append(str(failure))
        return stuck

    def image(self, folder, kind, size, *options):
        """Makes a filesystem in a sparse file beside `folder`, and mounts it there."""
        image = folder.with_suffix(".img")
        folder.mkdir(parents=True)
        with open(image, "wb") as file:
            file.truncate(size)
        force = {"ext4": "-F", "btrfs": "-f", "xfs": "-f"}[kind]
        run(f"mkfs.{kind}", "-q", force, *options, image)
        self.mount_image(folder, kind)

    @staticmethod
    def mount_image(folder, kind):
        """Mounts what `image` made, again."""
        run("mount", "-t", kind, "-o", "loop", folder.with_suffix(".img"), folder)
        must_be_mounted(folder, kind)


@contextlib.contextmanager
def undisturbed():
    """Cleaning up is not interrupted by a second Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
