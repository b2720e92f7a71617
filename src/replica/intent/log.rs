//! Writing the intent log: first touches durable on every replica, together where they meet.
//!
//! The log is in *intervals*, from one checkpoint to the next. While a checkpoint runs two are
//! open, each in its half of the file: one whose operations are about to end, and the next. An
//! object is recorded once in an interval. Whoever needs a record waits until it is durable;
//! records that are needed while others are being written share the next write.
//!
//! Where a half is full, one last record says that everything may be dirty: nobody ever waits for
//! a checkpoint.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::format::{
    Base, HALF_RECORDS, Header, LOG_BYTES, MovedDir, RECORD_BYTES, Said, encode, load, log_name,
    newest, parse, record_at,
};
use super::{Dirty, Epoch};
use crate::error::Result;
use crate::replica::backing::{Access, Backing, Creds, Handle};
use crate::replica::handles::open_private;
use crate::replica::{Handles, PrivateDir, ReplicaSet};
use crate::types::{NodeId, ReplicaId};

/// From so many records on a checkpoint is wanted.
const WANTED_AT: u32 = HALF_RECORDS / 4 * 3;
/// So much of each half of a new log is written with zeros, for records of an ordinary interval:
/// making one durable there allocates nothing. What is behind it is allocated when it is needed.
const ZERO_BYTES: usize = 64 << 10;

/// A batch of records by its number: the order in which they become durable.
type Batch = u64;

/// From one checkpoint to the next.
struct Interval {
    first: Epoch,
    half: u64,
    used: u32,
    /// As in an epoch.
    born_from: NodeId,
    late: HashSet<NodeId>,
    recorded: HashMap<Dirty, Batch>,
    moved: Vec<MovedDir>,
    /// It is recorded that everything may be dirty.
    everything: Option<Batch>,
}

struct State {
    header: Header,
    /// It is being written.
    header_is_on_its_way: bool,
    files: Arc<Handles>,
    /// The last one is the one in which operations begin.
    intervals: Vec<Interval>,
    /// Records that are not written yet, with their places.
    waiting: Vec<(u64, [u8; RECORD_BYTES])>,
    /// The batch that what is recorded now goes with.
    next: Batch,
    /// Batches up to this one are durable, or failed.
    done: Batch,
    failed: HashSet<Batch>,
    writing: bool,
}

/// What is durable in the log of every replica.
struct Durable {
    header: Header,
    header_is_on_its_way: bool,
    files: Arc<Handles>,
    recorded: Vec<Dirty>,
    everything: bool,
}

/// The log of a mounted store.
pub(super) struct Log {
    state: Mutex<State>,
    more: Condvar,
}

impl Interval {
    fn new(first: Epoch, half: u64, born_from: NodeId) -> Interval {
        Interval {
            first,
            half,
            used: 0,
            born_from,
            late: HashSet::new(),
            recorded: HashMap::new(),
            moved: Vec::new(),
            everything: None,
        }
    }
}

impl State {
    fn durable(&self) -> Durable {
        let done = |batch: Batch| batch <= self.done && !self.failed.contains(&batch);
        // What a header on its way closes counts no more.
        let closed = self.header.closed;
        let intervals = self.intervals.iter().filter(|interval| interval.first > closed);
        let recorded = intervals.clone().flat_map(|interval| &interval.recorded);
        Durable {
            header: self.header,
            header_is_on_its_way: self.header_is_on_its_way,
            files: self.files.clone(),
            recorded: recorded.filter(|(_, batch)| done(**batch)).map(|(what, _)| *what).collect(),
            everything: intervals.clone().any(|interval| interval.everything.is_some_and(done)),
        }
    }

    /// The place of the interval that an epoch belongs to.
    fn interval_at(&self, epoch: Epoch) -> usize {
        let found = self.intervals.iter().rposition(|interval| interval.first <= epoch);
        found.expect("an interval stays open while an epoch of it has operations")
    }

    /// The batch that must be durable before `what` may be changed; `None` if nothing has to be
    /// recorded for it.
    fn need(&mut self, at: usize, what: Dirty, moved: &[MovedDir]) -> Option<Batch> {
        let (mount, batch) = (self.header.mount, self.next);
        let interval = &mut self.intervals[at];
        let node = what.node();
        if node >= interval.born_from && !interval.late.contains(&node) {
            return None;
        }
        if let Some(known) = interval.everything.or(interval.recorded.get(&what).copied()) {
            return Some(known);
        }
        let born = interval.born_from;
        let mut said: Vec<Said> = match what {
            Dirty::Moved(_) => moved.iter().map(|dir| Said::Moved(*dir)).collect(),
            _ => vec![Said::Dirty(what, born)],
        };
        if interval.used as usize + said.len() >= HALF_RECORDS as usize {
            interval.everything = Some(batch);
            said = vec![Said::Everything];
        } else {
            interval.recorded.insert(what, batch);
            interval.moved.extend(moved);
        }
        for said in said {
            let at = record_at(interval.half, interval.used);
            self.waiting.push((at, encode(mount, interval.first, said)));
            interval.used += 1;
        }
        Some(batch)
    }
}

impl Log {
    /// Begins the log of a mount on every replica; the first epoch is 1.
    pub fn begin(replicas: &ReplicaSet, mount: i64, next: NodeId, base: Base) -> Result<Log> {
        let mut number = 0;
        let files = replicas.apply("intent log", |_, b| {
            let (file, known) = open(b)?;
            number = number.max(known);
            Ok(file)
        })?;
        let files = Arc::new(Handles::from(files));
        let header = Header { number, mount, closed: Epoch(0), base };
        let log = Log {
            state: Mutex::new(State {
                header,
                header_is_on_its_way: false,
                files,
                intervals: vec![Interval::new(Epoch(1), 1, next)],
                waiting: Vec::new(),
                next: 1,
                done: 0,
                failed: HashSet::new(),
                writing: false,
            }),
            more: Condvar::new(),
        };
        log.write_header(replicas, Epoch(0), base)?;
        Ok(log)
    }

    /// Makes sure that it is on record, durably, that `what` of an operation of this epoch may be
    /// dirty. `moved` tells how each replica knows a directory that moves.
    pub fn ensure(
        &self,
        replicas: &ReplicaSet,
        epoch: Epoch,
        what: &[Dirty],
        moved: &[MovedDir],
    ) -> Result<()> {
        let mut state = self.state.lock();
        let at = state.interval_at(epoch);
        let mut batch = 0;
        for &what in what {
            batch = batch.max(state.need(at, what, moved).unwrap_or(0));
        }
        while state.done < batch {
            if state.writing {
                self.more.wait(&mut state);
                continue;
            }
            state.writing = true;
            let (number, files) = (state.next, state.files.clone());
            state.next += 1;
            let mut records = std::mem::take(&mut state.waiting);
            drop(state);
            records.sort_unstable_by_key(|(at, _)| *at);
            let written = replicas.apply("intent", |id, b| write(b, files.get(id)?, &records));
            state = self.state.lock();
            state.writing = false;
            state.done = number;
            if let Err(error) = written {
                log::error!("the intent log cannot be written: {error}");
                state.failed.insert(number);
                for interval in &mut state.intervals {
                    interval.recorded.retain(|_, batch| *batch != number);
                    interval.everything = interval.everything.filter(|batch| *batch != number);
                }
            }
            self.more.notify_all();
        }
        match state.failed.is_empty() || !state.failed.contains(&batch) {
            true => Ok(()),
            false => Err(Errno::IO.into()),
        }
    }

    /// A node got this id in an operation of `epoch`: it is none of a later interval's newborn.
    pub fn born(&self, epoch: Epoch, node: NodeId) {
        let mut state = self.state.lock();
        let own = state.interval_at(epoch);
        for interval in &mut state.intervals[own + 1..] {
            if node >= interval.born_from {
                interval.late.insert(node);
            }
        }
    }

    /// The first epoch of the newest interval, if the one before that is open, too.
    pub fn turned(&self) -> Option<Epoch> {
        let state = self.state.lock();
        if state.intervals.len() > 1 { state.intervals.last().map(|last| last.first) } else { None }
    }

    /// Operations of `epoch` and later ones belong to a new interval. The one before it must be
    /// closed before the next.
    pub fn turn(&self, epoch: Epoch, born_from: NodeId) {
        let mut state = self.state.lock();
        assert!(state.intervals.len() == 1, "two halves, two intervals");
        let half = state.intervals[0].half + 1;
        state.intervals.push(Interval::new(epoch, half, born_from));
    }

    /// What epochs before the newest interval dirtied is durable everywhere: they count no more.
    pub fn close(&self, replicas: &ReplicaSet, base: Base) -> Result<Epoch> {
        let first = {
            let state = self.state.lock();
            state.intervals.last().map_or(Epoch(1), |interval| interval.first)
        };
        // Dead before the header is durable: the records of both intervals count. After it: those
        // of the newer.
        self.write_header(replicas, Epoch(first.0 - 1), base)?;
        self.state.lock().intervals.retain(|interval| interval.first >= first);
        Ok(first)
    }

    /// Whether so much is recorded that a checkpoint is wanted.
    pub fn is_long(&self) -> bool {
        let state = self.state.lock();
        state.intervals.last().is_some_and(|interval| interval.used >= WANTED_AT)
    }

    /// How many records there are since the last checkpoint.
    pub fn count(&self) -> u64 {
        self.state.lock().intervals.iter().map(|interval| u64::from(interval.used)).sum()
    }

    fn write_header(&self, replicas: &ReplicaSet, closed: Epoch, base: Base) -> Result<()> {
        let (header, files) = {
            let mut state = self.state.lock();
            let number = state.header.number + 1;
            state.header = Header { number, closed, base, ..state.header };
            state.header_is_on_its_way = true;
            (state.header, state.files.clone())
        };
        let written = replicas.apply("intent", |id, b| {
            let file = files.get(id)?;
            b.write_at(file, &header.encode(), header.at())?;
            b.sync(file, true)
        });
        self.state.lock().header_is_on_its_way = false;
        written.map(|_| ())
    }

    /// Begins the log of a replica that comes into use: from here on it has all that the others
    /// have. To be called while no operation runs, before the replica is admitted.
    pub fn join(&self, replicas: &ReplicaSet, id: ReplicaId, b: &dyn Backing) -> io::Result<()> {
        let mut state = self.state.lock();
        let (file, _) = open(b)?;
        let mut records = Vec::new();
        for interval in &state.intervals {
            let dirty = interval.recorded.keys().filter(|what| !matches!(what, Dirty::Moved(_)));
            let dirty = dirty.map(|&what| Said::Dirty(what, interval.born_from));
            let moved = interval.moved.iter().map(|&dir| Said::Moved(dir));
            let all = interval.everything.map(|_| Said::Everything);
            // No more than the others have, whose next record comes behind all of these.
            for (at, said) in dirty.chain(moved).chain(all).enumerate() {
                let place = record_at(interval.half, at as u32);
                records.push((place, encode(state.header.mount, interval.first, said)));
            }
        }
        records.sort_unstable_by_key(|(at, _)| *at);
        write(b, &file, &records)?;
        self.begin_with(&mut state, replicas, id, b, file)
    }

    /// Looks whether a replica's log has what is written in it, under its name. If not, it says
    /// from here on that everything may be dirty: nobody has to wait for that, and the next
    /// checkpoint makes it as exact as the others. `None` for one that is whole.
    pub fn heal(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        b: &dyn Backing,
    ) -> Option<io::Result<()>> {
        let known = self.state.lock().durable();
        if is_whole(&known, id, b).is_ok_and(|whole| whole) {
            return None;
        }
        // A checkpoint came between, or it is damaged.
        let mut state = self.state.lock();
        match is_whole(&state.durable(), id, b) {
            Ok(true) => None,
            _ => Some(self.write_everything(&mut state, replicas, id, b)),
        }
    }

    fn write_everything(
        &self,
        state: &mut State,
        replicas: &ReplicaSet,
        id: ReplicaId,
        b: &dyn Backing,
    ) -> io::Result<()> {
        let (file, _) = open(b)?;
        for interval in &state.intervals {
            // No other record ever has the last place.
            let at = record_at(interval.half, HALF_RECORDS - 1);
            b.write_at(&file, &encode(state.header.mount, interval.first, Said::Everything), at)?;
        }
        b.sync(&file, true)?;
        self.begin_with(state, replicas, id, b, file)
    }

    /// Writes the header of a log that has its records, and takes it into use.
    fn begin_with(
        &self,
        state: &mut State,
        replicas: &ReplicaSet,
        id: ReplicaId,
        b: &dyn Backing,
        file: Handle,
    ) -> io::Result<()> {
        // Last, for without it the records count for nothing.
        b.write_at(&file, &state.header.encode(), state.header.at())?;
        b.sync(&file, true)?;
        let mut own = Some(file);
        let files = state.files.clone();
        state.files = Arc::new(Handles::new(replicas.map_ids(|other| {
            if other == id { own.take() } else { files.get(other).ok().cloned() }
        })));
        Ok(())
    }
}

/// Whether the log of a replica, as it lies there, says what is known to be durable in it.
fn is_whole(known: &Durable, id: ReplicaId, b: &dyn Backing) -> io::Result<bool> {
    let dir = b.open_dir(&PrivateDir::Root.path())?;
    let file = b.open_file(&dir, &log_name(), Access::Read)?;
    if b.stat(&file)?.ino != b.stat(known.files.get(id)?)?.ino {
        return Ok(false);
    }
    b.forget_cached(&file);
    let bytes = load(b, &file)?;
    let (Some(header), Some(past)) = (newest(&bytes), parse(&bytes)) else { return Ok(false) };
    let (last, number) = (known.header.number, header.number);
    let current = header.mount == known.header.mount
        && (number == last || (known.header_is_on_its_way && number + 1 == last));
    let has = |what: &Dirty| match what {
        Dirty::File(node) => past.dirty.files.contains(node),
        Dirty::Dir(node) => past.dirty.dirs.contains(node),
        Dirty::Moved(node) => past.moved.iter().any(|dir| dir.node == *node),
    };
    let all = past.everything || (!known.everything && known.recorded.iter().all(has));
    Ok(current && all)
}

/// Writes records, as few runs as they lie in, and makes them durable.
fn write(b: &dyn Backing, file: &Handle, records: &[(u64, [u8; RECORD_BYTES])]) -> io::Result<()> {
    let mut run: Vec<u8> = Vec::new();
    let mut from = 0;
    for (at, record) in records {
        if from + run.len() as u64 != *at && !run.is_empty() {
            b.write_at(file, &run, from)?;
            run.clear();
        }
        if run.is_empty() {
            from = *at;
        }
        run.extend_from_slice(record);
    }
    if !run.is_empty() {
        b.write_at(file, &run, from)?;
    }
    b.sync(file, true)
}

/// Opens the log of a backing, made where it is missing or not whole. Returns the number of its
/// newest header, too.
fn open(b: &dyn Backing) -> io::Result<(Handle, u64)> {
    let dir = open_private(b, PrivateDir::Root)?;
    match b.open_file(&dir, &log_name(), Access::ReadWrite) {
        Ok(file) if b.stat(&file)?.size == LOG_BYTES => {
            let number = newest(&load(b, &file)?).map_or(0, |header| header.number);
            return Ok((file, number));
        }
        Ok(_) => b.unlink(&dir, &log_name())?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = b.create(&dir, &log_name(), 0o600, Creds::DAEMON)?;
    b.truncate(&file, LOG_BYTES)?;
    let first = record_at(0, 0);
    b.write_at(&file, &vec![0; first as usize + ZERO_BYTES], 0)?;
    b.write_at(&file, &[0; ZERO_BYTES], record_at(1, 0))?;
    b.sync(&file, false)?;
    b.sync(&dir, false)?;
    Ok((file, 0))
}
