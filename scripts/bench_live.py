"""The systems whose speed is compared: each makes itself anew for a group of works, and goes.

All of them stand on images of one kind and size. One is up at a time, so that no other's dirty
pages or background work is measured with it.
"""

import os
import pathlib

from bench_place import REARVIEW, Failure, mounts, must_be_equal, must_be_mounted, run
from bench_systems import Borg, Restic, settle_history, status

NAMES = ["ext4", "ext4-twice", "btrfs", "mergerfs", "bindfs", "rearview", "rearview-xfs"]
# Where an administrator allows FUSE over io_uring: there only where the kernel has that.
URING = pathlib.Path("/sys/module/fuse/parameters/enable_uring")
OVER_RINGS = ["rearview-uring"] if URING.exists() else []
BROWSERS = ["restic", "borg"]
# What FUSE alone takes, in memory, and with bare copies on two disks (tests/floor.rs). Measured
# when they are asked for: the server is built for that.
FLOORS = ["floor", "floor-twice"]
ALL = NAMES + OVER_RINGS + BROWSERS + FLOORS
FLOOR_SERVER = os.environ.get("FLOOR_SERVER", "")
MKFS = {"ext4": ["-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"], "xfs": []}
SNAPSHOT = "before"


class Live:
    """A live tree. What reads is run in the first of `folders`, what changes in all of them."""

    def __init__(self, place, name, size):
        self.place = place
        self.name = name
        self.size = size
        self.folder = place.path / name
        self.folders = []

    def up(self):
        """Makes it, empty and mounted."""
        raise NotImplementedError

    def check(self):
        """Fails unless it is what its name says: else the numbers would be another's."""
        raise NotImplementedError

    def snapshot(self, name):
        """Takes a snapshot; `None` where there is no such thing."""
        return None

    def past(self, name):
        """Where a snapshot is seen."""
        raise Failure(f"{self.name} has no snapshots")

    def sync(self):
        """Writes what is dirty to the images, so that nobody pays for what came before."""
        for point, kind, _ in mounts():
            if self.folder in point.parents and not kind.startswith("fuse"):
                run("sync", "-f", point)

    def settle(self):
        """Ends the background work that a measurement left, so that the next one is alone."""

    def finish(self):
        """What is to be true at the end."""

    def down(self):
        """Takes it down."""
        self.place.clear(self.folder)
        self.folder.rmdir()

    def disk(self, name, kind="ext4"):
        """An image with a filesystem of its own, mounted, and a folder in it."""
        disk = self.folder / name
        self.place.image(disk, kind, self.size, *MKFS[kind])
        (disk / "live").mkdir()
        return disk / "live"


class Plain(Live):
    """A folder of one filesystem, or one each of several, written one after another."""

    def up(self):
        count = 2 if self.name == "ext4-twice" else 1
        self.folders = [self.disk(f"disk{number}") for number in range(count)]

    def check(self):
        for folder in self.folders:
            must_be_mounted(folder.parent, "ext4")


class Btrfs(Live):
    """RAID1 over two images."""

    def up(self):
        root = self.folder / "btrfs"
        root.mkdir(parents=True)
        devices = []
        for number in range(2):
            image = self.folder / f"device{number}.img"
            with open(image, "wb") as file:
                file.truncate(self.size)
            devices.append(run("losetup", "-f", "--show", image).strip())
        run("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", *devices)
        run("mount", "-t", "btrfs", "-o", f"device={devices[1]}", devices[0], root)
        run("btrfs", "subvolume", "create", root / "live")
        self.folders = [root / "live"]
        # As a mirror with history has it: what was there stays.
        self.snapshot("empty")

    def check(self):
        root = self.folders[0].parent
        must_be_mounted(root, "btrfs")
        told = run("btrfs", "filesystem", "df", root)
        if "Data, RAID1" not in told:
            raise Failure(f"{root} is no RAID1: {told}")

    def snapshot(self, name):
        live = self.folders[0]
        run("btrfs", "subvolume", "snapshot", "-r", live, live.parent / name)
        return True

    def past(self, name):
        return self.folders[0].parent / name


def serve(command, *words, point, env=None):
    """Starts a program that serves a mount and does not go to the background by itself."""
    wait = ' >"$0.log" 2>&1 & for _ in $(seq 200); do ' \
        'mountpoint -q "$0" && exit; sleep 0.05; done; cat "$0.log" >&2; exit 1'
    run("sh", "-c", command + wait, point, *words, env=env)


class Floor(Live):
    """A FUSE filesystem that keeps all in memory, or files on two disks and nothing beside them."""

    def up(self):
        if not FLOOR_SERVER:
            raise Failure("FLOOR_SERVER does not name the server: run scripts/bench")
        mnt = self.folder / "mnt"
        mnt.mkdir(parents=True)
        count = 2 if self.name == "floor-twice" else 0
        disks = ":".join(str(self.disk(f"disk{number}")) for number in range(count))
        env = {"FLOOR": str(mnt), "FLOOR_DISKS": disks}
        serve('"$1" --ignored serve', FLOOR_SERVER, point=mnt, env=env)
        self.folders = [mnt]

    def check(self):
        must_be_mounted(self.folders[0], "fuse")


class Over(Live):
    """A FUSE filesystem that shows one folder of one ext4."""

    def up(self):
        below, mnt = self.disk("disk"), self.folder / "mnt"
        mnt.mkdir()
        if self.name == "mergerfs":
            # Its own limit would make small images answer ENOSPC.
            run("mergerfs", "-o", "allow_other,use_ino,minfreespace=0", below, mnt)
        else:
            run("bindfs", below, mnt)
        self.folders = [mnt]

    def check(self):
        must_be_mounted(self.folders[0], {"mergerfs": "fuse.mergerfs", "bindfs": "fuse"}[self.name])


def daemon_pid(backing):
    """The number of the daemon that holds a backing."""
    text = (backing / ".rearview/lock").read_text(encoding="utf-8")
    return int(text.split("pid = ")[1].split()[0])


class Rearview(Live):
    """Two replicas, with history."""

    def up(self):
        kind = "xfs" if self.name.endswith("xfs") else "ext4"
        backings = [self.disk(f"disk{number}", kind) for number in range(2)]
        mnt = self.folder / "mnt"
        mnt.mkdir()
        self._mount(*backings, mnt)
        self.backings = backings
        self.folders = [mnt]
        # History holds from here on.
        self.snapshot("empty")

    def _mount(self, *folders):
        over_rings = self.name.endswith("uring")
        allowed = URING.read_text().strip() if over_rings else ""
        if over_rings:
            URING.write_text("Y")
        try:
            how = "auto" if over_rings else "off"
            run(REARVIEW, "mount", "--init", "-o", f"io_uring={how}", *folders)
        finally:
            if over_rings:
                # What is mounted keeps it.
                URING.write_text(allowed)

    def _is_over_rings(self):
        """Whether threads that serve rings are there."""
        tasks = pathlib.Path(f"/proc/{daemon_pid(self.backings[0])}/task").glob("*/comm")
        names = (task.read_text() for task in tasks)
        return any(name.startswith("rv-ring") for name in names)

    def check(self):
        must_be_mounted(self.folders[0], "fuse.rearview")
        if self._is_over_rings() != self.name.endswith("uring"):
            raise Failure(f"{self.folders[0]} is served in another way than {self.name} says")
        if len(status(self.folders[0])["replicas"]) != 2:
            raise Failure(f"{self.folders[0]} has not two replicas")

    def snapshot(self, name):
        run(REARVIEW, "snapshot", "create", self.folders[0], name)
        return True

    def past(self, name):
        return self.folders[0] / ".snapshots" / name

    def settle(self):
        settle_history(self.folders[0])

    def finish(self):
        self.check()
        run(REARVIEW, "umount", self.folders[0])
        must_be_equal(*self.backings, ".rearview")


class Browser(Live):
    """A backup program whose mount shows what was backed up. It has no live tree of its own."""

    def up(self):
        live = self.disk("disk")
        self.folders = [live]
        self.shown = self.folder / "shown"
        keeper = Restic if self.name == "restic" else None
        self.keeper = keeper(self.folder, live) if keeper else Borg(self.folder, live, "lz4")
        self.keeper.begin()

    def check(self):
        must_be_mounted(self.folders[0].parent, "ext4")

    def snapshot(self, name):
        if name != SNAPSHOT:
            return None
        self.keeper.keep(1)
        self.shown.mkdir()
        environment = {**os.environ, **self.keeper.environment}
        if self.name == "borg":
            run("borg", "mount", self.keeper.repository, self.shown, env=environment)
        else:
            serve('restic -q -r "$1" mount "$0"', self.keeper.repository, point=self.shown,
                  env=environment)
        must_be_mounted(self.shown, "fuse")
        return True

    def past(self, name):
        if self.name == "borg":
            return self.shown / "v0001"
        return self.shown / "snapshots" / "latest"


def lives(place, wanted, size):
    """The wanted systems."""
    kinds = {"ext4": Plain, "ext4-twice": Plain, "btrfs": Btrfs, "mergerfs": Over, "bindfs": Over}
    kinds.update(dict.fromkeys(["rearview", "rearview-xfs", *OVER_RINGS], Rearview))
    kinds["restic"] = Browser
    kinds.update({name: Floor for name in FLOORS})
    return [kinds.get(name, Browser)(place, name, size) for name in wanted]


def tree_size(folder):
    """How many objects are below, for checking that a command did its work."""
    return sum(len(names) + len(folders) for _, folders, names in os.walk(pathlib.Path(folder)))
