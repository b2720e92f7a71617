"""`scripts/bench growth`: whether work stays as quick, and memory as small, as a store grows.

The store is filled step by step; at each size the same small work is timed beside what it took when
the store was empty. At the end the same once more with many snapshots, and many files made, written
and removed one after another. Of the daemon its memory and its open files are told each time.
"""

import json
import pathlib
import subprocess
import time

import bench_report as report
from bench_jobs import Sizes, Sources, drop_caches, shell
from bench_live import Rearview
from bench_place import REARVIEW, Failure, Place, run, say
from bench_systems import status, versions_of_programs

FORM = 1
WORKS = ("untar", "ls -lR, cold", "read all, cold", "snapshot", "rm -rf")
PER_DIRECTORY = 1000
# After each of them memory and open files are looked at.
PARTS = 8
LEGEND = """\
Milliseconds of the same work at each size of the store; fill: microseconds for each file added
since the line before. rss and open: the daemon's memory in MiB and its open files after all files of the
store were listed with their attributes.
"""


class Steps:
    """How far it goes."""

    def __init__(self, quick, most, cycles):
        most = most or (2_000 if quick else 100_000)
        self.fills = [count for count in (most // 100, most // 10, most) if count]
        self.work_files = 100 if quick else 1000
        self.snapshots = 20 if quick else 1000
        self.cycles = cycles or most


def add_arguments(parser):
    """The options of `growth` alone."""
    parser.add_argument("--most", type=int, help="files in the end (default: 100000)")
    parser.add_argument("--cycles", type=int,
                        help="files that are made, written and removed then (default: as many)")


def daemon(mnt):
    """The process that serves a mount."""
    found = subprocess.run(["pgrep", "-f", f"mount.*{mnt}"], capture_output=True, check=False)
    pids = found.stdout.split()
    if len(pids) != 1:
        raise Failure(f"{len(pids)} processes serve {mnt}")
    return pathlib.Path("/proc") / pids[0].decode()


def held(process):
    """MiB of memory and open files."""
    lines = (process / "status").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return round(kib / 1024, 1), sum(1 for _ in (process / "fd").iterdir())


def timed(action):
    """Milliseconds."""
    start = time.monotonic()
    action()
    return round((time.monotonic() - start) * 1000, 1)


def fill(mnt, since, until):
    """Adds small files, a thousand to a directory."""
    for number in range(since, until):
        folder = mnt / "store" / f"{number // PER_DIRECTORY:05}"
        if number % PER_DIRECTORY == 0 or number == since:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:08}").write_bytes(b"%d\n" % number)


def work(live, sources, steps, name):
    """The work whose time is to stay."""
    mnt, times = live.folders[0], {}
    folder = mnt / "work"
    folder.mkdir()
    archive = sources.tar(steps.work_files)
    times["untar"] = timed(lambda: run("tar", "-xf", archive, "-C", folder))
    drop_caches(live, sources)
    times["ls -lR, cold"] = timed(lambda: shell("ls -lR work >/dev/null", mnt))
    drop_caches(live, sources)
    read = "find work -type f -print0 | xargs -0 cat >/dev/null"
    times["read all, cold"] = timed(lambda: shell(read, mnt))
    times["snapshot"] = timed(lambda: live.snapshot(name))
    times["rm -rf"] = timed(lambda: run("rm", "-rf", folder))
    return times


def cycle(folder, count):
    """Makes, writes and removes so many files."""
    folder.mkdir()
    for number in range(count):
        path = folder / str(number % 64)
        path.write_bytes(b"scratch %d\n" % number)
        path.unlink()


def main(options):
    """Measures, tells, and returns 0."""
    steps = Steps(options.quick, options.most, options.cycles)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with Place(options.scratch) as place:
        sizes = Sizes(quick=True, files=steps.work_files, mib=1)
        sources = Sources(place.path / "sources", sizes, [])
        # An inode and a block for each file, its history and the catalog.
        live = Rearview(place, "rearview", max(steps.fills[-1] * (32 << 10), 2 << 30))
        live.up()
        process, filled = daemon(live.folders[0]), 0

        def line(label, **more):
            shell("ls -lR >/dev/null", live.folders[0])
            rss, files = held(process)
            times = work(live, sources, steps, f"at-{len(lines)}")
            lines.append({"label": label, "files": filled, "rss_mib": rss, "open": files,
                          "times": times, **more})
            say(f"   {lines[-1]}")

        line("empty")
        for count in steps.fills:
            spent = timed(lambda count=count: fill(live.folders[0], filled, count))
            per_file, filled = round(spent * 1000 / (count - filled)), count
            line(f"{count} files", fill_us=per_file)
        for number in range(steps.snapshots):
            (live.folders[0] / "changes").write_bytes(b"%d" % number)
            live.snapshot(f"s{number:05}")
        line(f"+ {steps.snapshots} snapshots")
        spent, during = 0, []
        for part in range(PARTS):
            folder = live.folders[0] / f"cycles{part}"
            spent += timed(lambda folder=folder: cycle(folder, steps.cycles // PARTS))
            during.append(held(process))
            say(f"   {part + 1} of {PARTS} parts of the cycles: {during[-1]}")
        line(f"+ {steps.cycles} cycles", fill_us=round(spent * 1000 / steps.cycles),
             during=during)
        totals = status(live.folders[0])["totals"]
        live.check()
        run(REARVIEW, "umount", live.folders[0])
    tell(options.out, lines, totals)
    return 0


def tell(out, lines, totals):
    """Table, JSON and chart."""
    header = ["store", "fill us", *WORKS, "rss", "open"]
    rows = [
        [line["label"], str(line.get("fill_us", "-")),
         *(f"{line['times'][name]:.0f}" for name in WORKS),
         f"{line['rss_mib']:.0f}", str(line["open"])]
        for line in lines
    ]
    programs = versions_of_programs()
    facts = {"form": FORM, "date": report.today(), "machine": report.machine(),
             "programs": programs, "totals": totals, "lines": lines}
    report.write_json(out / "growth.json", facts)
    text = report.text_table(header, rows) + "\n" + LEGEND + f"{json.dumps(totals)}\n"
    report.write(out / "growth.txt", text)
    panels = [
        (name, "milliseconds", [(line["label"], line["times"][name],
                                 f"{line['times'][name]:.0f} ms") for line in lines])
        for name in WORKS
    ]
    panels.append(("memory", "MiB", [(line["label"], line["rss_mib"],
                                      f"{line['rss_mib']:.0f} MiB") for line in lines]))
    chart = report.svg_bars(f"The same work as a store grows ({report.today()})", panels)
    report.write(out / "growth.svg", chart)
    print(text + f"\nwritten: {out}/growth.txt, .json, .svg")
