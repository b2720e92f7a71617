"""The workloads: the same deterministic work for every system, told apart by nothing but its place.

A workload is prepared once (what it copies from is made), and then begun on any number of live
trees: `begin` makes version 1, each `step` the next one, `end` closes what is open. It counts the
bytes it changed, by which a system's history is then divided.
"""

import os
import pathlib
import random
import shutil
import sqlite3

from bench_place import Failure, run

MIB = 1 << 20
PAGE = 4096
SEED = 20261122

WORDS = (
    "the of and to in is that it was for on are with as his they be at one have this from by hot "
    "word but what some can out other were all there when up use your how said an each she which "
    "their time will way about many then them write would like so these her long make thing see "
    "him two has look more day could go come did number sound no most people my over know water "
    "than call first who may down side been now find any new work part take get place made live"
).split()


def dice(*what):
    """A generator of its own for each thing that is made: order and place do not matter."""
    return random.Random(" ".join(map(str, (SEED, *what))))


def resave(path, data, in_place):
    """Saves as editors do: truncating and writing, or by a second file renamed over the first."""
    if in_place:
        with open(path, "wb") as file:
            file.write(data)
        return
    beside = path.with_name(path.name + ".new~")
    with open(beside, "wb") as file:
        file.write(data)
    shutil.copymode(path, beside)
    os.replace(beside, path)


class Work:
    """What all workloads have."""

    name = ""
    title = ""
    # What `changed` counts.
    unit = ""

    def __init__(self, versions):
        self.versions = versions
        # The bytes by which a history is measured.
        self.changed = 0
        # The bytes that really differ, where that is less and known.
        self.differing = None

    @property
    def samples(self):
        """The versions that are compared with plain copies: early, middle, and the last but one."""
        return sorted({1, self.versions // 2, self.versions - 1})

    def settings(self):
        """What must be the same for two runs to be comparable."""
        return {"versions": self.versions, "seed": SEED}

    def prepare(self, store):
        """Makes what `begin` and `step` read, once, in the folder `store`."""

    def begin(self, live):
        """Makes version 1 in the empty folder `live`."""
        raise NotImplementedError

    def step(self, live, version):
        """Makes the next version."""
        raise NotImplementedError

    def end(self):
        """Closes what is open; safe at any time."""


class Tree(Work):
    """A source tree whose files are edited."""

    name = "tree"
    title = "source tree, 1 % of the files edited per version"
    unit = "sizes of the edited files"

    def __init__(self, versions, files):
        super().__init__(versions)
        self.files = files
        self._source = None
        self._names = []

    def settings(self):
        return {**super().settings(), "files": self.files}

    def prepare(self, store):
        """Copies real source files, always the same ones on one machine."""
        self._source = store / "sources"
        cargo = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
        system = pathlib.Path("/usr")
        roots = (cargo / "registry/src", system / "lib/python3", system / "include")
        count = 0
        for root in roots:
            for path in sorted(self._sources_below(root)):
                if count == self.files:
                    break
                aim = self._source / root.name / path.relative_to(root)
                aim.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, aim)
                shutil.copymode(path, aim)
                count += 1
        if count < self.files:
            raise Failure(f"only {count} of {self.files} source files found in {roots}")
        names = (path for path in self._source.rglob("*") if path.is_file())
        self._names = sorted(path.relative_to(self._source) for path in names)

    @staticmethod
    def _sources_below(root):
        for folder, folders, names in os.walk(root):
            # Compiled files come and go with the interpreter's use.
            folders[:] = [name for name in folders if name not in ("__pycache__", ".git")]
            for name in names:
                path = pathlib.Path(folder, name)
                if path.is_symlink() or not path.is_file() or name.endswith(".pyc"):
                    continue
                if 0 < path.stat().st_size <= 512 * 1024:
                    yield path

    def begin(self, live):
        self.changed = self.differing = 0
        run("cp", "-a", self._source, live / "src")

    def step(self, live, version):
        chance = dice("tree", version)
        for turn, name in enumerate(chance.sample(self._names, max(1, len(self._names) // 100))):
            path = live / "src" / name
            data, differing = self._edited(path.read_bytes(), chance, version)
            resave(path, data, in_place=turn % 2 == 0)
            self.changed += len(data)
            self.differing += differing

    @staticmethod
    def _edited(data, chance, version):
        """A few lines changed, added and taken out, and how many bytes that is."""
        lines = data.splitlines(keepends=True)
        differing = 0
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(lines) + 1)
            text = " ".join(chance.choices(WORDS, k=chance.randint(3, 12)))
            new = f"    // {version}: {text}\n".encode()
            kind = chance.randrange(4)
            if kind == 0 or at == len(lines):
                lines.insert(at, new)
                differing += len(new)
            elif kind == 1 and len(lines) > 1:
                differing += len(lines.pop(at))
            else:
                differing += max(len(lines[at]), len(new))
                lines[at] = new
        return b"".join(lines), differing


class Database(Work):
    """An SQLite database that stays open while its pages are updated in place."""

    name = "database"
    title = "open SQLite database, 1 % of the pages updated per version"
    unit = "updated pages x 4096"

    # With its record's header this fills one page and leaves no room for a second row.
    ROW = 4000

    def __init__(self, versions, size):
        super().__init__(versions)
        self.rows = size // PAGE
        self._connection = None

    def settings(self):
        return {**super().settings(), "rows": self.rows, "journal_mode": "delete"}

    def _body(self, row, version):
        """Half text, half noise, as records with keys, hashes and sentences are."""
        chance = dice("row", row, version)
        text = " ".join(chance.choices(WORDS, k=500)).encode()[: self.ROW // 2]
        return text + chance.randbytes(self.ROW - len(text))

    def begin(self, live):
        self.changed = 0
        connection = sqlite3.connect(live / "data.sqlite", isolation_level=None)
        self._connection = connection
        connection.execute(f"PRAGMA page_size = {PAGE}")
        connection.execute("PRAGMA cache_size = -65536")
        connection.execute("CREATE TABLE page (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
        connection.execute("BEGIN")
        rows = ((row, self._body(row, 0)) for row in range(1, self.rows + 1))
        connection.executemany("INSERT INTO page VALUES (?, ?)", rows)
        connection.execute("COMMIT")

    def step(self, live, version):
        chance = dice("database", version)
        count = max(1, self.rows // 100)
        rows = sorted(chance.sample(range(1, self.rows + 1), count))
        self._connection.execute("BEGIN")
        self._connection.executemany(
            "UPDATE page SET body = ? WHERE id = ?",
            ((self._body(row, version), row) for row in rows),
        )
        self._connection.execute("COMMIT")
        self.changed += count * PAGE

    def check_pages(self, before, live):
        """That one step changes as many pages as it counts, and the header's one more."""
        differing = 0
        with open(before / "data.sqlite", "rb") as old, open(live / "data.sqlite", "rb") as new:
            while True:
                one, other = old.read(MIB), new.read(MIB)
                if len(one) != len(other):
                    raise Failure("the database grew, though its rows only changed")
                if not one:
                    break
                if one != other:
                    pages = range(0, len(one), PAGE)
                    differing += sum(one[at : at + PAGE] != other[at : at + PAGE] for at in pages)
        counted = max(1, self.rows // 100)
        if differing != counted + 1:
            raise Failure(f"a step changed {differing} pages of the database, not {counted} + 1")

    def end(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Log(Work):
    """Two logs: one opened for every few lines, one held open all the time."""

    name = "log"
    title = "logs that grow, by many opens and by one long open"
    unit = "appended bytes"

    PIECE = 64 * 1024

    def __init__(self, versions, size):
        super().__init__(versions)
        # Each version adds as much to each of both logs.
        self.growth = size // versions // 2
        self._source = None
        self._long = None

    def settings(self):
        return {**super().settings(), "bytes": self.growth * self.versions * 2}

    def prepare(self, store):
        self._source = store / "lines"
        chance = dice("log")
        levels = ("INFO ", "INFO ", "INFO ", "DEBUG", "WARN ", "ERROR")
        moment, length = 1_700_000_000.0, 0
        with open(self._source, "wb") as file:
            while length < self.growth * self.versions * 2:
                moment += chance.random() / 50
                line = (
                    f"{moment:.6f} {chance.choice(levels)} worker-{chance.randrange(16)} "
                    f"request={chance.getrandbits(48):012x} user={chance.randrange(5000)} "
                    f"{' '.join(chance.choices(WORDS, k=6))} took={chance.randrange(90000)}us\n"
                ).encode()
                length += file.write(line)

    def begin(self, live):
        self._long = open(live / "long.log", "ab", buffering=0)
        self._grow(live, 1)
        self.changed = 0

    def step(self, live, version):
        self._grow(live, version)

    def _grow(self, live, version):
        with open(self._source, "rb") as source:
            source.seek((version - 1) * self.growth * 2)
            for start in range(0, self.growth, self.PIECE):
                size = min(self.PIECE, self.growth - start)
                with open(live / "many.log", "ab", buffering=0) as many:
                    self._append(many, source.read(size))
                self._append(self._long, source.read(size))

    def _append(self, file, data):
        if file.write(data) != len(data):
            raise Failure(f"a short write to {file.name}")
        self.changed += len(data)

    def end(self):
        if self._long is not None:
            self._long.close()
            self._long = None


class Photos(Work):
    """Incompressible files that are renamed and saved again as they are."""

    name = "photos"
    title = "photos renamed and saved again, the same bytes"
    unit = "bytes saved again"

    def __init__(self, versions, files):
        super().__init__(versions)
        self.files = files
        self._source = None

    def settings(self):
        return {**super().settings(), "files": self.files}

    def prepare(self, store):
        self._source = store / "camera"
        self._source.mkdir()
        for number in range(self.files):
            chance = dice("photo", number)
            noise = chance.randbytes(chance.randint(50_000, 300_000))
            header = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x48\x00\x48\x00\x00"
            (self._source / f"{number:05}").write_bytes(header + noise + b"\xff\xd9")

    @staticmethod
    def _name(live, number, version):
        return live / f"album{number % 20:02}" / f"{version}-IMG_{number:05}.jpg"

    def begin(self, live):
        self.changed = self.differing = 0
        for number in range(self.files):
            path = self._name(live, number, 1)
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(self._source / f"{number:05}", path)

    def step(self, live, version):
        for number in range(self.files):
            path = self._name(live, number, version)
            os.rename(self._name(live, number, version - 1), path)
            data = path.read_bytes()
            resave(path, data, in_place=number % 2 == 0)
            self.changed += len(data)


def workloads(quick):
    """All of them, in the order they are told of."""
    if quick:
        return [Tree(20, 2000), Database(11, 64 * MIB), Log(10, 50 * MIB), Photos(4, 300)]
    return [Tree(100, 5500), Database(51, 1024 * MIB), Log(50, 500 * MIB), Photos(4, 2000)]
