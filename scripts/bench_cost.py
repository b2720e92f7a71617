"""`scripts/bench cost`: the bytes that history costs for one replica, for the same work.

Every workload first runs on a plain folder. That run gives the copies of sampled versions with
which the others' versions are compared, and the last state, which all must reach. A number that
could not be taken is a failure with its reason, never a guess.
"""

import json
import time

import bench_report as report
from bench_place import Failure, Place, chosen, must_be_equal, run, say
from bench_systems import grounds, version_name, versions_of_programs
from bench_work import workloads

SYSTEMS = ["rearview", "restic", "borg", "borg-zstd3", "btrfs"]
FORM = 1
# Bytes of scratch space that the largest workload fills, with room for a costly history.
ROOM, ROOM_QUICK = 24 << 30, 3 << 30
HEADER = ["work", "system", "history", "ratio", "grown", "whole", "work s", "keep s", "pack s"]
LEGEND = """\
history  bytes stored beyond the live data alone, one replica: all below .rearview; for restic and
         borg the repository less a fresh one of the last state; for btrfs the bytes in use less
         those of a fresh copy of the last state
ratio    history / changed bytes
grown    bytes stored at the end less those after the first version (of restic, borg and btrfs this
         holds the live data's own growth)
whole    everything that is stored, the live data too
work s   the programs' own time; keep s: all snapshots or backups; pack s: the wait for the packer
         at the end
"""


def add_arguments(parser):
    """The options of `cost` alone."""
    parser.add_argument(
        "--reflink", action="store_true", help="also RearviewFS on XFS, whose files share extents"
    )
    parser.add_argument("--work", help="only these workloads, e.g. tree,log")
    parser.add_argument("--systems", help="only these systems, e.g. rearview,btrfs")


def main(options):
    """Measures, tells, and returns 1 if a number is missing."""
    works = workloads(options.quick)
    wanted = chosen(options.work, [work.name for work in works], "workload")
    known = SYSTEMS + (["rearview-xfs"] if options.reflink or options.systems else [])
    systems = chosen(options.systems, known, "system")
    if options.reflink and "rearview-xfs" not in systems:
        systems.append("rearview-xfs")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, versions_of_programs(), resume=options.resume)
    with Place(options.scratch) as place:
        place.must_have_room(ROOM_QUICK if options.quick else ROOM)
        for work in works:
            if work.name not in wanted:
                continue
            missing = [name for name in systems if not results.has(work, name)]
            if missing:
                measure(place, work, missing, results)
    results.write_all(works)
    return 1 if results.failed() else 0


def measure(place, work, systems, results):
    """One workload on all systems that are asked for."""
    folder = place.path / work.name
    folder.mkdir()
    reference = Reference(folder / "reference")
    try:
        say(f"== {work.title}: preparing")
        (folder / "store").mkdir()
        work.prepare(folder / "store")
        for ground in grounds(place, folder, systems):
            names = [keeper.name for keeper in ground.keepers]
            say(f"== {work.title}: {' and '.join(names) or 'reference only'}")
            try:
                for name, cell in measure_ground(work, ground, reference).items():
                    results.add(work, name, cell)
            except (Failure, OSError) as failure:
                if ground.name == "plain":
                    raise
                say(f"bench: {work.name} on {ground.name} failed: {failure}")
                results.add(work, ground.name, {"error": str(failure)})
            finally:
                # Files of ours that are open would keep the mount busy.
                work.end()
                place.clear(ground.folder)
    except (Failure, OSError) as failure:
        say(f"bench: {work.name} failed: {failure}")
        for name in systems:
            if not results.has(work, name):
                results.add(work, name, {"error": str(failure)})
    finally:
        place.clear(folder)


class Reference:
    """Plain copies of the sampled versions and of the last one, from the plain folder's run."""

    def __init__(self, folder):
        self.folder = folder
        self.copies = {}

    def take(self, live, version):
        """Copies a version."""
        copy = self.folder / version_name(version)
        copy.parent.mkdir(exist_ok=True)
        run("cp", "-a", "--reflink=auto", live, copy)
        self.copies[version] = copy

    def samples(self, work):
        """The copies with which histories are compared."""
        return {version: self.copies[version] for version in work.samples}


def measure_ground(work, ground, reference):
    """Runs the work on one live tree; returns the numbers of each of its keepers."""
    ground.up()
    plain = ground.name == "plain"
    keepers = {keeper.name: keeper for keeper in ground.keepers}
    spent = dict.fromkeys(keepers, 0.0)
    first, failed = {}, {}

    def each(action):
        for name, keeper in keepers.items():
            if name in failed:
                continue
            start = time.monotonic()
            try:
                action(name, keeper)
            except (Failure, OSError) as failure:
                say(f"bench: {work.name} with {name} failed: {failure}")
                failed[name] = {"error": str(failure)}
            spent[name] += time.monotonic() - start

    each(lambda _, keeper: keeper.begin())
    working, shown = 0.0, time.monotonic()
    for version in range(1, work.versions + 1):
        start = time.monotonic()
        if version == 1:
            work.begin(ground.live)
        else:
            work.step(ground.live, version)
        working += time.monotonic() - start
        each(lambda _, keeper: keeper.keep(version))
        if version == 1:
            good = ((name, keeper) for name, keeper in keepers.items() if name not in failed)
            first = {name: keeper.stored() for name, keeper in good}
        if plain and version in (*work.samples, work.versions):
            reference.take(ground.live, version)
        if plain and version == 2 and hasattr(work, "check_pages"):
            work.check_pages(reference.copies[1], ground.live)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"   version {version} of {work.versions}")
    work.end()
    # The same work must have given the same files everywhere.
    must_be_equal(ground.live, reference.copies[work.versions])

    cells = {}

    def finish(name, keeper):
        cell = keeper.finish(work.versions, reference.samples(work))
        cell["first"] = first[name]
        cells[name] = cell

    kept = dict(spent)
    each(finish)
    for name, cell in cells.items():
        stored = cell["allocated"] if name.startswith("rearview") else cell["whole"]
        cell.update(
            grown=stored - cell["first"],
            changed=work.changed,
            differing=work.differing,
            ratio=round(cell["history"] / work.changed, 4),
            work_seconds=round(working, 2),
            keep_seconds=round(kept[name], 2),
        )
    return {**cells, **failed}


class Results:
    """The cells measured so far, on disk after each one."""

    def __init__(self, out, programs, resume):
        self.out = out
        self.path = out / "cost.json"
        self.data = {
            "form": FORM,
            "date": report.today(),
            "machine": report.machine(),
            "programs": programs,
            "cells": {},
        }
        if resume and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier.get("form") == FORM and earlier.get("programs") == programs:
                self.data["cells"] = {
                    key: cell for key, cell in earlier["cells"].items() if "error" not in cell
                }

    @staticmethod
    def _key(work, system):
        return f"{work.name}/{system}"

    def has(self, work, system):
        """Whether the cell is there, measured with the same settings."""
        cell = self.data["cells"].get(self._key(work, system))
        return cell is not None and cell["settings"] == work.settings()

    def add(self, work, system, cell):
        """Adds a cell and writes all."""
        self.data["cells"][self._key(work, system)] = {**cell, "settings": work.settings()}
        report.write_json(self.path, self.data)

    def failed(self):
        """The cells that have a reason instead of numbers."""
        return {key: cell for key, cell in self.data["cells"].items() if "error" in cell}

    def write_all(self, works):
        """Table, Markdown and chart; the table goes to standard output as well."""
        rows, panels, notes = [], [], []
        for work in works:
            cells = [
                (name, self.data["cells"][self._key(work, name)])
                for name in [*SYSTEMS[:1], "rearview-xfs", *SYSTEMS[1:]]
                if self._key(work, name) in self.data["cells"]
            ]
            if not cells:
                continue
            good = [(name, cell) for name, cell in cells if "error" not in cell]
            rows += [[work.name, name, *numbers(cell)] for name, cell in cells]
            changed = good[0][1]["changed"] if good else None
            note = f"{work.versions} versions, changed {report.size(changed)} ({work.unit})"
            notes.append(f"{work.name}: {work.title}; {note}")
            bars = [(name, cell["history"], report.size(cell["history"])) for name, cell in good]
            panels.append((work.title, note, bars))
        text = report.text_table(HEADER, rows) + "\n" + "\n".join(notes) + "\n\n" + LEGEND
        text += self._details()
        for key, cell in self.failed().items():
            text += f"FAILED {key}: {cell['error']}\n"
        report.write(self.out / "cost.txt", text)
        report.write(self.out / "cost.md", report.markdown_table(HEADER, rows))
        title = f"Bytes of history, one replica ({self.data['date']})"
        report.write(self.out / "cost.svg", report.svg_bars(title, panels))
        print(text + f"\nwritten: {self.out}/cost.txt, .md, .json, .svg")

    def _details(self):
        text = ""
        for key, cell in self.data["cells"].items():
            if "parts" not in cell:
                continue
            parts = (f"{name} {report.size(count)}" for name, count in cell["parts"].items())
            text += (
                f"{key}: {', '.join(parts)}; apparent {report.size(cell['apparent'])}; "
                f"{cell['catalog_bytes_per_version']} catalog bytes per version\n"
            )
        return text


def numbers(cell):
    """The table's columns of one cell."""
    if "error" in cell:
        return ["FAILED", *["-"] * (len(HEADER) - 3)]
    return [
        report.size(cell["history"]),
        f"{cell['ratio']:.3f}",
        report.size(cell["grown"]),
        report.size(cell["whole"]),
        f"{cell['work_seconds']:.1f}",
        f"{cell['keep_seconds']:.1f}",
        f"{cell['settle_seconds']:.1f}" if "settle_seconds" in cell else "-",
    ]
