//! The system's allocator, with a count for every thread.

use nix::unistd::gettid;
use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// Threads that this process ever starts, at most.
const THREADS_MAX: usize = 256;
/// Backtraces that are kept of allocations where none should be.
const CULPRITS_MAX: usize = 3;

/// One thread's count. Places are never used again, thread ids may be.
struct Thread {
    id: AtomicI32,
    allocations: AtomicU64,
}

static THREADS: [Thread; THREADS_MAX] = [const {
    Thread {
        id: AtomicI32::new(0),
        allocations: AtomicU64::new(0),
    }
}; THREADS_MAX];
static THREADS_STARTED: AtomicUsize = AtomicUsize::new(0);
/// Whether workers should not allocate now.
static WATCHING: AtomicBool = AtomicBool::new(false);
static CULPRITS: Mutex<Vec<Backtrace>> = Mutex::new(Vec::new());

/// What a thread knows of itself; nothing of it is ever allocated or dropped.
#[derive(Clone, Copy)]
enum Place {
    Unknown,
    At(usize),
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Unknown) };
    /// Its backtrace is being made, which allocates.
    static TRACED: Cell<bool> = const { Cell::new(false) };
}

pub struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator with the caller's own arguments, and what that returns is returned.
// Counting neither allocates nor unwinds; making a backtrace allocates, but is not done within itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps to the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps to the contract of `realloc`, and `memory` is from `System`.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the contract of `dealloc`, and `memory` is from `System`.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn count() {
    if TRACED.get() {
        return;
    }
    let place = match PLACE.get() {
        Place::At(place) => place,
        Place::Unknown => {
            let place = THREADS_STARTED.fetch_add(1, Ordering::Relaxed);
            PLACE.set(Place::At(place));
            if let Some(thread) = THREADS.get(place) {
                thread.id.store(gettid().as_raw(), Ordering::Relaxed);
            }
            place
        }
    };
    if let Some(thread) = THREADS.get(place) {
        thread.allocations.fetch_add(1, Ordering::Relaxed);
    }
    if WATCHING.load(Ordering::Relaxed) {
        TRACED.set(true);
        keep_backtrace();
        TRACED.set(false);
    }
}

#[cold]
fn keep_backtrace() {
    if !std::thread::current()
        .name()
        .is_some_and(|name| name.starts_with(super::WORKER_NAME))
    {
        return;
    }
    let Ok(mut culprits) = CULPRITS.lock() else {
        return;
    };
    if culprits.len() < CULPRITS_MAX {
        culprits.push(Backtrace::force_capture());
    }
}

/// What was allocated so far by each thread of this process whose name begins so; by thread id.
pub fn by_threads_named(name: &str) -> BTreeMap<i32, u64> {
    assert!(
        THREADS_STARTED.load(Ordering::Relaxed) <= THREADS_MAX,
        "every thread has a place"
    );
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            // Gone meanwhile: then it is nobody to look at.
            let command = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            command
                .starts_with(name)
                .then(|| entry.file_name().to_str().unwrap().parse().unwrap())
        })
        .map(|id| (id, by_thread(id)))
        .collect()
}

fn by_thread(id: i32) -> u64 {
    // The latest, should an older thread have had the same id.
    THREADS
        .iter()
        .rev()
        .find(|thread| thread.id.load(Ordering::Relaxed) == id)
        .map_or(0, |thread| thread.allocations.load(Ordering::Relaxed))
}

/// From now on, where workers allocate is kept.
pub fn watch() {
    CULPRITS.lock().unwrap().clear();
    WATCHING.store(true, Ordering::Relaxed);
}

/// Where workers have allocated since [`watch`].
pub fn culprits() -> String {
    WATCHING.store(false, Ordering::Relaxed);
    let culprits = std::mem::take(&mut *CULPRITS.lock().unwrap());
    culprits
        .iter()
        .map(|backtrace| format!("\n{backtrace}"))
        .collect()
}
