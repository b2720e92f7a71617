"""The systems under comparison: where their live tree is, how they keep a version, what it costs.

A ground is a live tree and everything that keeps its versions: the plain one is kept by restic and
borg side by side, the others keep themselves. `history` always means the same: what is stored
beyond the live data alone, for one replica.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import time

from bench_place import (
    REARVIEW,
    Failure,
    must_be_equal,
    must_be_mounted,
    run,
    tree_bytes,
    used_bytes,
)

# The most that an image may hold; images are sparse.
IMAGE_BYTES = 24 << 30


def version_name(version):
    """The name of a version's snapshot or archive."""
    return f"v{version:04}"


class Keeper:
    """What keeps versions of a live tree."""

    name = ""

    def begin(self):
        """Makes ready, before there is any version."""

    def keep(self, version):
        """Keeps the live tree as it is now."""
        raise NotImplementedError

    def stored(self):
        """Bytes that it stores now, for the growth between two moments."""
        raise NotImplementedError

    def finish(self, versions, references):
        """Checks that all versions are there and returns the cell's numbers."""
        raise NotImplementedError


def must_count(name, found, versions):
    """A keeper that skipped a version would look cheap."""
    if found != versions:
        raise Failure(f"{name} has {found} versions, not {versions}")


class Restic(Keeper):
    """A backup after each version, with restic's own settings."""

    name = "restic"

    def __init__(self, folder, live):
        self.live = live
        self.repository = folder / "restic"
        self.environment = {
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
        }

    def _run(self, repository, *words):
        return run(
            "restic", "-q", "-r", repository, *words, cwd=self.live, env=self.environment
        )

    def begin(self):
        self._run(self.repository, "init")

    def keep(self, version):
        self._run(self.repository, "backup", "--tag", version_name(version), ".")

    def stored(self):
        return tree_bytes(self.repository)[0]

    def finish(self, versions, references):
        snapshots = json.loads(self._run(self.repository, "snapshots", "--json"))
        must_count(self.name, len(snapshots), versions)
        fresh = self.repository.with_name("restic-fresh")
        self._run(fresh, "init")
        self._run(fresh, "backup", ".")
        whole, alone = self.stored(), tree_bytes(fresh)[0]
        shutil.rmtree(fresh)
        return {"whole": whole, "alone": alone, "history": whole - alone}


class Borg(Keeper):
    """An archive after each version."""

    def __init__(self, folder, live, compression):
        self.name = "borg" if compression == "lz4" else f"borg-{compression.replace(',', '')}"
        self.compression = compression
        self.live = live
        self.repository = folder / self.name
        self.environment = {
            "BORG_BASE_DIR": str(folder / f"{self.name}-home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }

    def _run(self, *words):
        return run("borg", *words, cwd=self.live, env=self.environment)

    def _create(self, repository, name):
        self._run("create", "--compression", self.compression, f"{repository}::{name}", ".")

    def begin(self):
        # Borg wants its home to be there.
        pathlib.Path(self.environment["BORG_BASE_DIR"]).mkdir()
        self._run("init", "-e", "none", str(self.repository))

    def keep(self, version):
        self._create(self.repository, version_name(version))

    def stored(self):
        return tree_bytes(self.repository)[0]

    def finish(self, versions, references):
        archives = self._run("list", "--short", str(self.repository)).split()
        must_count(self.name, len(archives), versions)
        fresh = self.repository.with_name(f"{self.name}-fresh")
        self._run("init", "-e", "none", str(fresh))
        self._create(fresh, "only")
        whole, alone = self.stored(), tree_bytes(fresh)[0]
        shutil.rmtree(fresh)
        return {"whole": whole, "alone": alone, "history": whole - alone}


class Ground:
    """A live tree."""

    name = ""

    def up(self):
        """Makes the empty live tree."""
        raise NotImplementedError

    @property
    def live(self):
        """Where it is."""
        raise NotImplementedError

    @property
    def keepers(self):
        """What keeps its versions."""
        return [self]


class Plain(Ground):
    """A plain folder: the reference for all others, and what the backup programs read."""

    name = "plain"

    def __init__(self, folder, wanted):
        self.folder = folder
        everyone = [Restic(folder, self.live)]
        everyone += [Borg(folder, self.live, kind) for kind in ("lz4", "zstd,3")]
        self._keepers = [keeper for keeper in everyone if keeper.name in wanted]

    def up(self):
        self.live.mkdir(parents=True)

    @property
    def live(self):
        return self.folder / "live"

    @property
    def keepers(self):
        return self._keepers


class Btrfs(Ground, Keeper):
    """A read-only snapshot after each version. Metadata is kept once, as ours is per replica."""

    name = "btrfs"

    def __init__(self, place, folder):
        self.place = place
        self.folder = folder
        self.root = folder / "btrfs"

    def up(self):
        self.place.image(self.root, "btrfs", IMAGE_BYTES, "-m", "single")
        run("btrfs", "subvolume", "create", self.live)

    @property
    def live(self):
        return self.root / "live"

    def keep(self, version):
        aim = self.root / version_name(version)
        run("btrfs", "subvolume", "snapshot", "-r", self.live, aim)

    def stored(self):
        return self._used(self.root)

    @staticmethod
    def _used(root):
        """Bytes in use of data and of metadata."""
        run("btrfs", "filesystem", "sync", root)
        text = run("btrfs", "filesystem", "df", "-b", root)
        used = dict(re.findall(r"^(\w+), \w+: .*used=(\d+)$", text, re.M))
        if not {"Data", "Metadata"} <= used.keys():
            raise Failure(f"'btrfs filesystem df' told something unknown: {text}")
        return int(used["Data"]) + int(used["Metadata"]) + int(used.get("System", 0))

    def finish(self, versions, references):
        must_be_mounted(self.root, "btrfs")
        listed = run("btrfs", "subvolume", "list", "-r", self.root).splitlines()
        must_count(self.name, len(listed), versions)
        for version, copy in references.items():
            must_be_equal(self.root / version_name(version), copy)
        whole = self.stored()
        fresh = self.folder / "btrfs-fresh"
        self.place.image(fresh, "btrfs", IMAGE_BYTES, "-m", "single")
        # Not as clones of the other filesystem's extents, which cannot be, but as data.
        run("cp", "-a", "--reflink=never", f"{self.live}/.", fresh)
        alone = self._used(fresh)
        return {"whole": whole, "alone": alone, "history": whole - alone}


def status(mnt):
    """What the mount tells of itself; a degraded one would measure half of the work."""
    told = json.loads(run(REARVIEW, "status", "--json", mnt))
    if told["degraded"] or not all(replica["healthy"] for replica in told["replicas"]):
        raise Failure(f"{mnt} is degraded: {told['replicas']}")
    return told


def settle_history(mnt):
    """Has everything packed that was preserved. No snapshot goes: all of them have names."""
    run(REARVIEW, "prune", "--json", mnt)


class Rearview(Ground, Keeper):
    """A snapshot after each version, on two replicas; the numbers are those of one."""

    def __init__(self, place, folder, kind):
        self.name = "rearview" if kind == "ext4" else f"rearview-{kind}"
        self.kind = kind
        self.place = place
        self.folder = folder
        self.mnt = folder / "mnt"
        self.disks = [folder / "disk1", folder / "disk2"]
        self.backings = [disk / "backing" for disk in self.disks]
        self._empty = 0

    def up(self):
        options = {"ext4": ["-m", "0"], "xfs": ["-m", "reflink=1"]}[self.kind]
        for disk in self.disks:
            self.place.image(disk, self.kind, IMAGE_BYTES, *options)
        run("sync", "-f", self.disks[0])
        self._empty = used_bytes(self.disks[0])
        self.mnt.mkdir()
        run(REARVIEW, "mount", *self.backings, self.mnt)
        must_be_mounted(self.mnt, "fuse.rearview")
        found = len(status(self.mnt)["replicas"])
        if found != len(self.backings):
            raise Failure(f"{self.mnt} has {found} replicas, not {len(self.backings)}")

    @property
    def live(self):
        return self.mnt

    def keep(self, version):
        run(REARVIEW, "snapshot", "create", self.mnt, version_name(version))

    def stored(self):
        return tree_bytes(self.backings[0] / ".rearview")[0]

    def finish(self, versions, references):
        must_be_mounted(self.mnt, "fuse.rearview")
        start = time.monotonic()
        settle_history(self.mnt)
        settling = time.monotonic() - start
        listed = json.loads(run(REARVIEW, "snapshot", "list", "--json", self.mnt))["snapshots"]
        # When an hour ends meanwhile the daemon makes one of its own.
        ours = [snapshot for snapshot in listed if not snapshot["automatic"]]
        must_count(self.name, len(ours), versions)
        for version, copy in references.items():
            must_be_equal(self.mnt / ".snapshots" / version_name(version), copy)
        told = status(self.mnt)
        run(REARVIEW, "umount", self.mnt)
        must_be_equal(*self.backings, ".rearview")
        # Mounted anew, so that nothing is counted that the kernel has only set aside.
        for disk in self.disks:
            run("umount", disk)
            self.place.mount_image(disk, self.kind)
        return self._numbers(told, settling)

    def _numbers(self, told, settling):
        private = self.backings[0] / ".rearview"
        allocated, apparent = tree_bytes(private)
        parts = dict.fromkeys(("packs", "undo", "preserved", "catalog", "rest"), 0)
        for entry in os.scandir(private):
            part = "catalog" if entry.name.startswith("catalog.db") else entry.name
            parts[part if part in parts else "rest"] += tree_bytes(entry.path)[0]
        totals = told["totals"]
        recorded = totals["past_versions"] + totals["live_nodes"]
        live = tree_bytes(self.backings[0])[0] - allocated
        beyond_live = used_bytes(self.disks[0]) - self._empty - live
        # Where files share extents, counting files counts them twice: the filesystem knows.
        history = beyond_live if self.kind == "xfs" else allocated
        return {
            "whole": live + history,
            "alone": live,
            "history": history,
            "settle_seconds": round(settling, 2),
            "allocated": allocated,
            "apparent": apparent,
            "beyond_live_by_statvfs": beyond_live,
            "other_replica": tree_bytes(self.backings[1] / ".rearview")[0],
            "parts": parts,
            "totals": totals,
            "catalog_bytes_per_version": round(parts["catalog"] / max(1, recorded), 1),
        }


def grounds(place, folder, wanted):
    """The grounds that the wanted systems need; the plain one is always the first."""
    found = [Plain(folder / "plain", wanted)]
    if "btrfs" in wanted:
        found.append(Btrfs(place, folder / "btrfs"))
    for kind, name in (("ext4", "rearview"), ("xfs", "rearview-xfs")):
        if name in wanted:
            found.append(Rearview(place, folder / name, kind))
    return found


def versions_of_programs(**more):
    """What was measured, for the record: those that are installed, and `more` by their commands."""
    told = {}
    for name, command in {
        "rearview": (REARVIEW, "--version"),
        "restic": ("restic", "version"),
        "borg": ("borg", "--version"),
        "btrfs": ("btrfs", "--version"),
        **more,
    }.items():
        if shutil.which(command[0]):
            told[name] = run(*command).strip().splitlines()[0]
    # Two builds of one version are two programs.
    binary = pathlib.Path(shutil.which(REARVIEW) or REARVIEW).read_bytes()
    told["rearview"] += f" ({hashlib.sha256(binary).hexdigest()[:16]})"
    return told
