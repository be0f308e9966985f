//! A worker's packet memory. To find all its pages takes the kernel 3 to more than 100 ms. They are registered when they are there,
//! and the worker does without until then. Where that is not possible, it waits.

use super::latch::Share;
use super::{Command, Inlet, WorkerError};
use crate::stats::PacketMemory;
use crate::uring::buffer::{BUDGET_BYTES_MIN, Extent, Pool};
use crate::uring::ring::Ring;
use std::sync::Arc;

/// What a worker begins with.
pub(super) struct Memory {
    pub(super) pool: Pool,
    /// What is to be registered later: see [`populate`].
    pub(super) unregistered: Option<Extent>,
    pub(super) shown: Arc<PacketMemory>,
}

/// `bytes` of packet memory, to be registered later where that is allowed for sure (`lockable_bytes`) and the kernel can
/// populate it beside its use. Else it is [registered at once](registered_memory), when all workers have `mapped` theirs.
pub(super) fn packet_memory(
    ring: &mut Ring,
    bytes: usize,
    lockable_bytes: usize,
    mapped: Share,
) -> Result<Memory, WorkerError> {
    let shown = Arc::<PacketMemory>::default();
    if lockable_bytes >= bytes.max(BUDGET_BYTES_MIN) {
        let pool = Pool::new(bytes).map_err(|source| WorkerError::Memory { bytes, source })?;
        if pool.can_populate() {
            return Ok(Memory {
                unregistered: Some(pool.extent()),
                pool,
                shown,
            });
        }
        pool.unmap();
    }
    let (pool, is_registered) = registered_memory(ring, bytes, lockable_bytes, || mapped.wait())?;
    show_registered(&shown, is_registered);
    Ok(Memory {
        pool,
        unregistered: None,
        shown,
    })
}

/// Tells whether it is registered; the log, too, if it is not.
pub(super) fn show_registered(shown: &PacketMemory, is_registered: bool) {
    shown.registered.set(u64::from(is_registered));
    if !is_registered {
        tracing::info!("packet memory is not registered with io_uring (RLIMIT_MEMLOCK)");
    }
}

/// Populates the memory of each worker, and has the worker register it. Does not wait for that.
pub(super) fn populate(unregistered: Vec<(Extent, Arc<Inlet>)>) -> Result<(), WorkerError> {
    if unregistered.is_empty() {
        return Ok(());
    }
    let populate_all = move || {
        for (extent, inlet) in unregistered {
            if let Err(error) = extent.populate() {
                tracing::warn!("cannot populate packet memory: {error}");
                continue;
            }
            inlet.tell(Command::Register);
        }
    };
    std::thread::Builder::new()
        .name("ringtun-memory".into())
        .spawn(populate_all)
        .map(drop)
        .map_err(WorkerError::Thread)
}

/// Maps and registers `bytes` of packet memory, or `lockable_bytes` where that is less. RLIMIT_MEMLOCK may not allow so
/// much: it is halved down to [`BUDGET_BYTES_MIN`]. At last all `bytes` are used without registration, which nothing limits.
/// `on_mapped` is called once before any of it is registered: registering faults all pages in, and whoever wants to map
/// anything meanwhile waits (`mmap_lock`), and with him whoever wants to register.
pub(super) fn registered_memory(
    ring: &mut Ring,
    bytes: usize,
    lockable_bytes: usize,
    on_mapped: impl FnOnce(),
) -> Result<(Pool, bool), WorkerError> {
    let mut on_mapped = Some(on_mapped);
    let failed = |bytes| move |source| WorkerError::Memory { bytes, source };
    let mut budget = bytes.min(lockable_bytes).max(BUDGET_BYTES_MIN);
    loop {
        let pool = Pool::new(budget).map_err(failed(budget))?;
        pool.extent().prefer_huge_pages();
        if let Some(on_mapped) = on_mapped.take() {
            on_mapped();
        }
        if ring.register_pool(&pool).map_err(failed(budget))? {
            return Ok((pool, true));
        }
        pool.unmap();
        if budget == BUDGET_BYTES_MIN {
            return Ok((Pool::new(bytes).map_err(failed(bytes))?, false));
        }
        budget = (budget / 2).max(BUDGET_BYTES_MIN);
    }
}
