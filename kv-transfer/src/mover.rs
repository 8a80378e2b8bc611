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
//!
//! Where engines compute on all cores, a mover that is woken waits until one of them has used up its slice, and then for its own next turn. Movers
//! ask Linux for short slices: the scheduler (EEVDF, [`sched_setattr(2)`] from 6.12 on) then lets them in sooner, for the same share of a
//! core in sum.
//!
//! [`sched_setattr(2)`]: https://man7.org/linux/man-pages/man2/sched_setattr.2.html

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
            thread::Builder::new().name(format!("kv-mover-{number}")).spawn(move || {
                slice::shorten();
                runtime.block_on(stop.cancelled());
            })?;
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

#[cfg(target_os = "linux")]
mod slice {
    use std::{io, time::Duration};

    /// Longest that a mover computes while others wait for its core: some bursts.
    pub(super) const SLICE: Duration = Duration::from_micros(300);

    /// Asks for slices of [`SLICE`] for this thread. Where it runs by another policy, or the system has no such setting, all stays as it is.
    pub(super) fn shorten() {
        let asked = attributes().and_then(|mut attributes| {
            if attributes.sched_policy != libc::SCHED_OTHER as u32 {
                return Ok(());
            }
            attributes.sched_runtime = SLICE.as_nanos() as u64;
            // SAFETY: this thread (0), and a structure that is read, with its size inside.
            match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        if let Err(error) = asked {
            tracing::debug!(%error, "ask for short slices");
        }
    }

    /// Returns how this thread is scheduled.
    pub(super) fn attributes() -> io::Result<libc::sched_attr> {
        let size = size_of::<libc::sched_attr>() as u32;
        // SAFETY: a structure of numbers.
        let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
        // SAFETY: this thread (0), and a structure that is written, of the size that is named.
        match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } {
            0 => Ok(attributes),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod slice {
    pub(super) fn shorten() {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// As far as the system has slices, movers have short ones, and nothing else about them changes.
    #[test]
    fn movers_have_short_slices() {
        let ours = slice::attributes().expect("this thread's");
        let (tell, told) = mpsc::channel();
        let movers = Movers::start(1).expect("threads");
        movers.spawn(0, async move { tell.send(slice::attributes()).expect("somebody waits") });
        let theirs = told.recv().expect("it runs").expect("a mover's");
        let rest = |of: &libc::sched_attr| (of.sched_policy, of.sched_nice, of.sched_flags, of.sched_priority);
        assert_eq!(rest(&theirs), rest(&ours));
        // Before 6.12 slices are not told, and stay 0.
        if ours.sched_runtime > 0 {
            assert_eq!(u128::from(theirs.sched_runtime), slice::SLICE.as_nanos());
        }
    }
}
