//! The decoded frames that are kept in memory, and who is decoding which.
//!
//! Whoever misses a frame gets a [`Claim`] of it; others that want the frame meanwhile wait until
//! the claim is filled or given up. Nobody who holds a claim waits for another, so no wait is for
//! ever.

use std::collections::HashSet;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use crate::history::pack::Frame;
use crate::types::PackId;

/// A frame: its pack and its offset there.
pub type Key = (PackId, u64);

/// Decoded frames, the least recently used of which leave first.
pub struct FrameCache {
    state: Mutex<State>,
    settled: Condvar,
}

struct State {
    frames: LruCache<Key, Arc<Frame>>,
    claimed: HashSet<Key>,
    /// Bytes of memory that `frames` take, and the most that they may.
    bytes: u64,
    limit: u64,
}

/// What one finds who looks for a frame.
pub enum Found {
    /// The frame.
    Frame(Arc<Frame>),
    /// Nothing, and the duty to fill it.
    Claim(Claim),
}

/// The duty to decode a frame. Dropped unfilled, it passes to the next who wants the frame.
pub struct Claim {
    cache: Arc<FrameCache>,
    key: Key,
}

impl Claim {
    /// Puts the frame into the cache.
    pub fn fill(self, frame: &Arc<Frame>) {
        self.cache.state.lock().put(self.key, frame.clone());
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.cache.state.lock().claimed.remove(&self.key);
        self.cache.settled.notify_all();
    }
}

impl FrameCache {
    /// An empty cache of at most `limit` bytes.
    pub fn new(limit: u64) -> Arc<FrameCache> {
        let frames = LruCache::unbounded();
        let state = State { frames, claimed: HashSet::new(), bytes: 0, limit };
        Arc::new(FrameCache { state: Mutex::new(state), settled: Condvar::new() })
    }

    /// Changes the limit.
    pub fn set_limit(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.limit = bytes;
        state.shrink();
    }

    /// The frame, once nobody else is decoding it; or the claim to do so.
    pub fn get(self: &Arc<Self>, key: Key) -> Found {
        let mut state = self.state.lock();
        loop {
            if let Some(frame) = state.frames.get(&key) {
                return Found::Frame(frame.clone());
            }
            if state.claimed.insert(key) {
                return Found::Claim(Claim { cache: self.clone(), key });
            }
            self.settled.wait(&mut state);
        }
    }

    /// A claim of a frame that is neither here nor being decoded.
    pub fn claim(self: &Arc<Self>, key: Key) -> Option<Claim> {
        let mut state = self.state.lock();
        let free = !state.frames.contains(&key) && state.claimed.insert(key);
        free.then(|| Claim { cache: self.clone(), key })
    }

    /// Drops a frame.
    pub fn forget(&self, key: Key) {
        self.state.lock().pop(key);
    }

    /// Drops all frames of a pack.
    pub fn forget_pack(&self, pack: PackId) {
        let mut state = self.state.lock();
        let own: Vec<Key> =
            state.frames.iter().map(|(key, _)| *key).filter(|key| key.0 == pack).collect();
        own.into_iter().for_each(|key| state.pop(key));
    }

    /// Bytes of memory in use.
    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }

    /// Whether a frame is here.
    #[cfg(test)]
    pub fn has(&self, key: Key) -> bool {
        self.state.lock().frames.contains(&key)
    }
}

impl State {
    fn put(&mut self, key: Key, frame: Arc<Frame>) {
        self.bytes += frame.memory_bytes();
        if let Some((_, old)) = self.frames.push(key, frame) {
            self.bytes -= old.memory_bytes();
        }
        self.shrink();
    }

    fn pop(&mut self, key: Key) {
        if let Some(frame) = self.frames.pop(&key) {
            self.bytes -= frame.memory_bytes();
        }
    }

    fn shrink(&mut self) {
        while self.bytes > self.limit {
            let Some((_, frame)) = self.frames.pop_lru() else { return };
            self.bytes -= frame.memory_bytes();
        }
    }
}
