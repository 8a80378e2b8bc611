//! The threads that move bytes.
//!
//! Copying, digesting and socket calls of hundreds of kilobytes take tens of microseconds each and keep coming; on the
//! process's own reactor they would sit between the router's and the worker's small tasks. So each [`Transfer`](crate::Transfer)
//! has a few threads of its own, each running a single-threaded reactor on which every link's data connections live. Their
//! number does not grow with the number of links, an idle one costs nothing, and nothing on them waits other than by being
//! woken by the kernel: no polling peer is needed, however busy the cores are. Only at the end of a hand-off does the driver keep home
//! awake for some tens of microseconds.
//!
//! The first of them is *home* to all else of the links, too: listener, control connections and driver. Waking another thread costs
//! some 20 µs, as much as copying 300 KiB; at home a push, its copy, its report and the commit that follows it are one wake-up, and
//! a message that arrives is another. In return whoever copies there lets the others in after every burst.

use std::{future::Future, io, thread};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// The mover threads of one worker. Dropping it ends them and drops what runs on them.
#[derive(Debug)]
pub(crate) struct Movers {
    handles: Vec<Handle>,
    stop: CancellationToken,
}

impl Movers {
    /// Starts `count` threads.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        // Made first: when a later thread cannot be had, dropping it ends the earlier ones.
        let mut movers = Self { handles: Vec::new(), stop: CancellationToken::new() };
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            movers.handles.push(runtime.handle().clone());
            let stop = movers.stop.clone();
            thread::Builder::new()
                .name(format!("kv-mover-{number}"))
                .spawn(move || runtime.block_on(stop.cancelled()))?;
        }
        Ok(movers)
    }

    /// Returns their number.
    pub(crate) fn count(&self) -> usize {
        self.handles.len()
    }

    /// Returns the home of what is not moving bytes.
    pub(crate) fn home(&self) -> &Handle {
        &self.handles[0]
    }

    /// Runs `task` on mover `number`, wrapping around. Until then nothing of it runs; sockets are to be registered inside.
    pub(crate) fn spawn(&self, number: usize, task: impl Future<Output = ()> + Send + 'static) {
        self.handles[number % self.handles.len()].spawn(task);
    }
}

impl Drop for Movers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
