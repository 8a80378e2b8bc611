//! How late this machine is.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// Notes how late a thread that sleeps is woken, until dropped. What must happen within a time may be as much later: the rest
/// of the machine had the cores meanwhile.
pub(crate) struct Lateness(Arc<(AtomicBool, AtomicU64)>);

impl Lateness {
    pub(crate) fn start() -> Self {
        const NAP: Duration = Duration::from_millis(5);
        let shared = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let late = shared.clone();
        thread::spawn(move || {
            while !late.0.load(Relaxed) {
                let slept = Instant::now();
                #[allow(clippy::disallowed_methods)] // What is measured.
                thread::sleep(NAP);
                late.1.fetch_add(slept.elapsed().saturating_sub(NAP).as_micros() as u64, Relaxed);
            }
        });
        Self(shared)
    }

    /// Returns the sum since the start.
    pub(crate) fn taken(&self) -> Duration {
        Duration::from_micros(self.0.1.load(Relaxed))
    }
}

impl Drop for Lateness {
    fn drop(&mut self) {
        self.0.0.store(true, Relaxed);
    }
}
