"""`scripts/bench speed`: the time that the same work takes on RearviewFS and on its peers.

Every round makes each system anew for each group of works, one at a time and in another order than
in the round before, so that what drifts in the machine meets all alike. A work that failed has its
reason in the table instead of a time.
"""

import json
import statistics
import time

import bench_report as report
from bench_jobs import GROUPS, Sizes, Sources
from bench_live import ALL, BROWSERS, NAMES, OVER_RINGS, lives
from bench_place import Failure, Place, chosen, say
from bench_systems import versions_of_programs

FORM = 1
PEERS = {
    "mergerfs": ("mergerfs", "-v"),
    "bindfs": ("bindfs", "--version"),
    "fio": ("fio", "--version"),
    "git": ("git", "--version"),
}
# The browsers have no live tree: only what is done with a snapshot is asked of them.
BROWSED = ("past",)
LEGEND = """\
Medians in milliseconds, ± half of the range between the slowest and the fastest round in percent.
ext4-twice is one ext4 after the other; btrfs is RAID1 with snapshots, rearview two replicas on ext4
with history; mergerfs and bindfs show one folder of one ext4. All images are in memory. `cold`:
after dropping the kernel's caches and running the programs once elsewhere. restic and borg show a
backup by their own mounts. rearview-uring is rearview where the kernel sends requests over
io_uring. floor keeps all in memory: what the way through FUSE takes by itself;
floor-twice keeps files on two ext4, and those deleted, and does nothing beside that.
"""


def add_arguments(parser):
    """The options of `speed` alone."""
    parser.add_argument("--rounds", type=int, help="how many (default: 5, quick: 1)")
    parser.add_argument("--work", help=f"only these groups: {','.join(GROUPS)}")
    parser.add_argument("--systems", help=f"only these: {','.join(ALL)}")
    parser.add_argument("--files", type=int, help="small files instead of 6000")
    parser.add_argument("--mib", type=int, help="size of large files instead of 512 MiB")
    parser.add_argument("--order", type=int, default=0, help="with which system to begin")


def main(options):
    """Measures, tells, and returns 1 if a time is missing."""
    sizes = Sizes(options.quick, options.files, options.mib)
    groups = chosen(options.work, GROUPS, "group")
    known = NAMES + ([] if options.quick else OVER_RINGS) + BROWSERS
    if options.systems:
        known = ALL
    systems = chosen(options.systems, known, "system")
    rounds = options.rounds or (1 if options.quick else 5)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, sizes, resume=options.resume)
    with Place(options.scratch) as place:
        place.must_have_room(4 * sizes.overwrite_mib << 20)
        say("== preparing")
        sources = Sources(place.path / "sources", sizes, groups)
        for turn in range(rounds):
            for group in groups:
                at = (turn + options.order) % len(systems)
                order = systems[at:] + systems[:at]
                order = [name for name in order if name not in BROWSERS or group in BROWSED]
                say(f"== round {turn + 1} of {rounds}: {group}")
                for live in lives(place, order, sizes.image_bytes()):
                    measure(live, group, sources, sizes, results)
    results.write_all()
    return 1 if results.failed else 0


def measure(live, group, sources, sizes, results):
    """One group of works on one system."""
    work = group
    try:
        live.up()
        live.check()
        for work, action, *kind in GROUPS[group](live, sources, sizes):
            live.sync()
            spent = 0.0
            for folder in live.folders[:1] if kind else live.folders:
                start = time.monotonic()
                own = action(folder)
                whole = time.monotonic() - start
                spent += own if isinstance(own, float) else whole
            live.check()
            results.add(work, live.name, spent)
        live.finish()
    except (Failure, OSError) as failure:
        say(f"bench: {work} on {live.name} failed: {failure}")
        results.fail(work, live.name, str(failure))
    finally:
        live.down()


class Results:
    """The times so far."""

    def __init__(self, out, sizes, resume):
        self.path = out / "speed.json"
        self.out = out
        self.failed = {}
        self.times = {}
        self.facts = {
            "form": FORM,
            "date": report.today(),
            "machine": report.machine(),
            "programs": versions_of_programs(**PEERS),
            "sizes": vars(sizes),
        }
        if resume and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            # What another build of ours took says nothing of this one; the peers' times stay.
            if all(earlier.get(key) == self.facts[key] for key in ("form", "machine", "sizes")):
                same = earlier["programs"]["rearview"] == self.facts["programs"]["rearview"]
                self.times = {
                    work: {name: cell for name, cell in cells.items()
                           if same or not name.startswith("rearview")}
                    for work, cells in earlier["times"].items()
                }

    def add(self, work, system, seconds):
        """Adds a time, and writes all."""
        self.times.setdefault(work, {}).setdefault(system, []).append(round(seconds, 5))
        self._write_json()

    def fail(self, work, system, reason):
        """Notes why there is no time."""
        self.failed[f"{work} / {system}"] = reason
        self._write_json()

    def _write_json(self):
        report.write_json(self.path, {**self.facts, "times": self.times, "failed": self.failed})

    def write_all(self):
        """Tables and chart; the table goes to standard output as well."""
        systems = [name for name in ALL
                   if any(name in cells for cells in self.times.values())]
        header = ["work", *systems]
        rows = [[work, *(cell(cells.get(name)) for name in systems)]
                for work, cells in self.times.items()]
        panels = []
        for work, cells in self.times.items():
            bars = [(name, statistics.median(cells[name]), cell(cells[name]) + " ms")
                    for name in systems if name in cells]
            panels.append((work, "", bars))
        machine = self.facts["machine"]
        text = report.text_table(header, rows) + "\n" + LEGEND
        text += f"kernel {machine['kernel']}, {machine['processors']} processors; "
        text += ", ".join(self.facts["programs"].values()) + "\n"
        for key, reason in self.failed.items():
            text += f"FAILED {key}: {reason}\n"
        report.write(self.out / "speed.txt", text)
        report.write(self.out / "speed.md", report.markdown_table(header, rows))
        title = f"Time of the same work, less is better ({self.facts['date']})"
        report.write(self.out / "speed.svg", report.svg_bars(title, panels))
        print(text + f"\nwritten: {self.out}/speed.txt, .md, .json, .svg")


def cell(times):
    """A median and its spread."""
    if not times:
        return "-"
    middle = statistics.median(times)
    text = f"{middle * 1000:.{0 if middle >= 0.1 else 1}f}"
    if len(times) > 1 and middle > 0:
        text += f" ±{(max(times) - min(times)) / middle * 50:.0f}"
    return text
