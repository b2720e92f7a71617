"""`scripts/bench durable`: what it costs to be sure, and how long it takes to be sure again.

Four measurements on two replicas, each on a disk of its own in memory: fsync of one file beside the
backings' own, what somebody at work notices of checkpoints, the time of a mount after the daemon was
killed, by the number of files, with the same work since the last checkpoint, and what somebody at
work notices of a replica that comes back.
"""

import os
import pathlib
import multiprocessing
import queue
import random
import statistics
import threading
import time

import bench_report as report
from bench_live import daemon_pid
from bench_place import REARVIEW, Place, must_be_mounted, run, say

FORM = 1
KINDS = ("ext4", "xfs")
IMAGE_BYTES = 8 << 30
BLOCK = b"x" * 4096
FILES_A_FOLDER = 1000
# Files that are changed and made between the last checkpoint and the death.
CHANGED = 200


def add_arguments(parser):
    """The options of `durable` alone."""
    parser.add_argument("--syncs", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seconds", type=int, default=60, help="of work beside checkpoints")
    parser.add_argument("--files", default="10000,500000", help="sizes of stores to be killed")
    parser.add_argument("--resyncs", type=int, default=25, help="how many (default: 25)")
    parser.add_argument("--only", help="one of fsync, stall, recovery, resync")


def main(options):
    """Measures and tells."""
    options.out.mkdir(parents=True, exist_ok=True)
    syncs, seconds, sizes = options.syncs, options.seconds, options.files
    resyncs = options.resyncs
    if options.quick:
        syncs, seconds, sizes, resyncs = 100, 6, "1000,5000", 2
    facts = {"form": FORM, "date": report.today(), "machine": report.machine()}
    works = {
        "fsync": lambda place: fsync(place, syncs),
        "stall": lambda place: stall(place, seconds),
        "recovery": lambda place: recovery(place, [int(size) for size in sizes.split(",")]),
        "resync": lambda place: resync(place, resyncs),
    }
    with Place(options.scratch) as place:
        for name, work in works.items():
            if options.only in (None, name):
                say(f"== {name}")
                facts[name] = work(place)
                place.clear(place.path)
                report.write_json(options.out / "durable.json", facts)
                for line, numbers in facts[name].items():
                    print(f"{name:9} {line:34} {numbers}", flush=True)
    return 0


def disks(place):
    """An empty backing on each of two filesystems."""
    backings = []
    for index, kind in enumerate(KINDS):
        disk = place.path / f"disk{index}"
        place.image(disk, kind, IMAGE_BYTES)
        backings.append(disk / "backing")
        backings[-1].mkdir()
    return backings


def mount(place, backings):
    """Mounts and tells how long that took."""
    point = place.path / "mnt"
    point.mkdir(exist_ok=True)
    begin = time.monotonic()
    run(REARVIEW, "mount", "-o", "snapshot_every=0", *backings, point)
    took = time.monotonic() - begin
    must_be_mounted(point, "fuse.rearview")
    return point, took


def spread(times):
    """Milliseconds: the median, the 99th percentile and the longest."""
    times = sorted(1000 * one for one in times)
    at = min(len(times) - 1, int(len(times) * 0.99))
    return {
        "p50": round(statistics.median(times), 3),
        "p99": round(times[at], 3),
        "max": round(times[-1], 3),
        "count": len(times),
    }


def write_and_sync(path, count):
    """Appends a block and makes it durable, again and again; the times of the syncs."""
    times = []
    with open(path, "wb", buffering=0) as file:
        for _ in range(count):
            file.write(BLOCK)
            begin = time.monotonic()
            os.fsync(file.fileno())
            times.append(time.monotonic() - begin)
    return times


def fsync(place, count):
    """In the backings' filesystems by themselves, and in the mount."""
    backings = disks(place)
    found = {}
    for kind, backing in zip(KINDS, backings):
        found[f"{kind} alone"] = spread(write_and_sync(backing.parent / "alone", count))
    point, _ = mount(place, backings)
    found["two replicas"] = spread(write_and_sync(point / "file", count))
    return found


def stall(place, seconds):
    """Works for half of the time without and for half with a snapshot, which is a checkpoint, every
    second."""
    backings = disks(place)
    point, _ = mount(place, backings)
    found = {}
    for name, snapshots in (("without checkpoints", False), ("a checkpoint every second", True)):
        ended = threading.Event()
        lasted = []

        def checkpoints():
            index = 0
            while not ended.wait(1.0):
                begin = time.monotonic()
                os.mkdir(point / ".snapshots" / f"s{index}")
                lasted.append(time.monotonic() - begin)
                index += 1

        beside = threading.Thread(target=checkpoints)
        if snapshots:
            beside.start()
        times = []
        deadline = time.monotonic() + seconds / 2
        folder = point / ("with" if snapshots else "without")
        folder.mkdir()
        try:
            while time.monotonic() < deadline:
                begin = time.monotonic()
                with open(folder / f"f{len(times) % 500}", "wb", buffering=0) as file:
                    file.write(BLOCK)
                times.append(time.monotonic() - begin)
        finally:
            ended.set()
            if snapshots:
                beside.join()
        found[f"open, write, close {name}"] = spread(times)
        if lasted:
            found["the checkpoints themselves"] = spread(lasted)
    return found


def recovery(place, sizes):
    """Mounts after a clean end, does the same work in each store, kills the daemon and mounts."""
    found = {}
    for size in sizes:
        backings = disks(place)
        for index in range(size):
            folder = backings[0] / f"d{index // FILES_A_FOLDER:04}"
            if index % FILES_A_FOLDER == 0:
                folder.mkdir()
            (folder / f"f{index}").write_bytes(b"%d" % index)
        backings[1].rmdir()
        run("cp", "-a", backings[0], backings[1])
        point, _ = mount(place, backings)
        # Else the next mount waits for the second replica, whose files are being looked at.
        run(REARVIEW, "resync", "--wait", cwd=point)
        run(REARVIEW, "umount", point)
        point, clean = mount(place, backings)
        (point / ".snapshots" / "last-checkpoint").mkdir()
        # In one folder, which is as large in every store.
        for index in range(CHANGED):
            (point / "d0000" / f"new{index}").write_bytes(BLOCK)
            (point / "d0000" / f"f{index}").write_bytes(b"changed")
        kill(backings[0])
        _, recovered = mount(place, backings)
        found[f"{size} files"] = {
            "clean_ms": round(clean * 1000, 1),
            "after_kill_ms": round(recovered * 1000, 1),
        }
        place.clear(place.path)
    return found


def keep_changing(folder, seed, ended, times):
    """Small files are made, written, renamed and removed without pause, as long as it takes; tells
    when each change began and how long it took."""
    folder.mkdir()
    dice = random.Random(seed)
    done = []
    while not ended.is_set():
        path = folder / f"f{dice.randrange(400)}"
        kind = dice.randrange(10)
        begin = time.monotonic()
        try:
            if kind < 6:
                path.write_bytes(b"x" * dice.choice((200, 4096, 65536)))
            elif kind < 8:
                path.rename(folder / f"f{dice.randrange(400)}")
            elif kind < 9:
                path.unlink()
            else:
                with open(path, "r+b", buffering=0) as file:
                    file.write(b"y" * 100)
        except FileNotFoundError:
            pass
        done.append((begin, time.monotonic() - begin))
    times.put(done)


def told(times, programs):
    """What the next program tells; an error if none can any more: it died before."""
    while True:
        alive = any(program.is_alive() for program in programs)
        try:
            return times.get(timeout=1)
        except queue.Empty:
            if not alive:
                raise RuntimeError("a program that was to keep changing files has died") from None


def resync(place, count):
    """A replica misses changes, comes back, and misses others, while two programs go on."""
    backings = disks(place)
    point, _ = mount(place, backings)
    ended, times = multiprocessing.Event(), multiprocessing.Queue()
    programs = [
        multiprocessing.Process(target=keep_changing, args=(point / f"w{n}", n, ended, times))
        for n in range(2)
    ]
    for program in programs:
        program.start()
    spans = []
    try:
        for _ in range(count):
            time.sleep(0.3)
            run(REARVIEW, "replica", "offline", backings[1], cwd=point)
            time.sleep(0.7)
            begin = time.monotonic()
            run(REARVIEW, "replica", "online", "--wait", backings[1], cwd=point)
            spans.append((begin, time.monotonic()))
    finally:
        ended.set()
        changes = [one for _ in programs for one in told(times, programs)]
        for program in programs:
            program.join()

    def meets(change, span):
        return change[0] < span[1] and change[0] + change[1] > span[0]

    during = [one for one in changes if any(meets(one, span) for span in spans)]
    longest = [max(took for begin, took in during if meets((begin, took), span)) for span in spans]
    beside = set(changes) - set(during)
    return {
        "a change while it is away, or current": spread([took for _, took in beside]),
        "a change during its resync": spread([took for _, took in during]),
        "the longest change of each resync": spread(longest),
        "the resyncs": spread([end - begin for begin, end in spans]),
    }


def kill(backing):
    """Kills the daemon that holds a backing, and waits for its end."""
    pid = daemon_pid(backing)
    os.kill(pid, 9)
    deadline = time.monotonic() + 20
    while pathlib.Path(f"/proc/{pid}").exists():
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(") ")[-1]
        if state.startswith("Z") or time.monotonic() > deadline:
            break
        time.sleep(0.01)
