//! Calls that are made by the caller itself, however long they take.
//!
//! A thread that works in the background, and holds no lock then, may hang: nobody waits for it.
//! Handed over, each of its calls would cost two turns of a processor that has better things to do:
//! beside a machine under load a resync could not keep up with what is changed.

use std::cell::Cell;
use std::marker::PhantomData;

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
