//! Calls that are made by the caller itself, however long they take.
//!
//! A thread that works in the background, and holds no lock then, may hang: nobody waits for it.
//! Handed over, each of its calls would cost two turns of a processor that has better things to do:
//! beside a machine under load a resync could not keep up with what is changed.
//!
//! Such a call is on record while it lasts. Somebody else looks now and then whether one hangs, and
//! gives it up in the thread's place: from then on it counts as overdue, and should it return after
//! all, the thread gets `ETIMEDOUT` for it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::sys::device::{Device, TURNS, Watch};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// While it lives the thread makes its calls itself, or has them bounded again.
#[must_use]
pub struct Directly {
    before: bool,
    /// It belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl Directly {
    /// The thread holds nothing that others wait for.
    pub fn on() -> Directly {
        Directly { before: ON.replace(true), _thread: PhantomData }
    }

    /// Within [`Directly::on`]: it does, for as long as this lives.
    pub fn off() -> Directly {
        Directly { before: ON.replace(false), _thread: PhantomData }
    }
}

impl Drop for Directly {
    fn drop(&mut self) {
        ON.set(self.before);
    }
}

pub(super) fn is_on() -> bool {
    ON.get()
}

/// The calls on one opening of a backing that threads make themselves.
#[derive(Default)]
pub(super) struct OwnCalls(Mutex<Book>);

#[derive(Default)]
struct Book {
    next: u64,
    calls: Vec<OwnCall>,
}

/// One that is under way.
struct OwnCall {
    number: u64,
    op: &'static str,
    since: Instant,
    /// What tells that it goes on though it takes long, and how often that was asked.
    watch: Option<(Watch, u32)>,
}

impl OwnCalls {
    /// A call begins; `watched` is one that may take as long as that device goes on working.
    pub(super) fn begin(&self, op: &'static str, watched: Option<Option<Device>>) -> u64 {
        let watch = watched.map(|device| (Watch::new(device), 1));
        let mut book = self.0.lock();
        book.next += 1;
        let number = book.next;
        book.calls.push(OwnCall { number, op, since: Instant::now(), watch });
        number
    }

    /// The call shows that it goes on.
    pub(super) fn renew(&self, number: u64) {
        if let Some(call) = self.0.lock().calls.iter_mut().find(|call| call.number == number) {
            call.since = Instant::now();
        }
    }

    /// It has returned. `false` if it was given up.
    pub(super) fn end(&self, number: u64) -> bool {
        let calls = &mut self.0.lock().calls;
        let at = calls.iter().position(|call| call.number == number);
        at.map(|at| calls.swap_remove(at)).is_some()
    }

    /// Whether one hangs.
    pub(super) fn hangs(&self, timeout: Duration) -> bool {
        // Each is asked: one that goes on must not be given up beside one that hangs.
        let mut any = false;
        for call in &mut self.0.lock().calls {
            any |= call.hangs(timeout);
        }
        any
    }

    /// Gives up those that hang, with a call of `gave_up` for each; returns their names.
    pub(super) fn give_up(&self, timeout: Duration, gave_up: impl Fn()) -> Vec<&'static str> {
        let mut book = self.0.lock();
        let hung = book.calls.extract_if(.., |call| call.since.elapsed() >= timeout);
        // Counted before its thread can see that it was given up.
        hung.inspect(|_| gave_up()).map(|call| call.op).collect()
    }
}

impl OwnCall {
    fn hangs(&mut self, timeout: Duration) -> bool {
        if self.since.elapsed() < timeout {
            return false;
        }
        let Some((watch, turns)) = &mut self.watch else { return true };
        let goes_on = *turns < TURNS && watch.has_moved();
        if goes_on {
            *turns += 1;
            self.since = Instant::now();
        }
        !goes_on
    }
}
