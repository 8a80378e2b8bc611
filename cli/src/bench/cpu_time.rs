//! CPU time of another process, as Linux counts it.

use anyhow::Context;
use std::{fs, time::Duration};

/// Returns the time that all threads of process `id` have run. A thread that has ended is not counted, so take differences
/// over spans in which the process keeps its threads.
///
/// # Errors
/// Where there is no `/proc/ID/task/*/schedstat`: on other systems than Linux, or when the process is gone.
pub(super) fn of(id: u32) -> anyhow::Result<Duration> {
    let mut total = Duration::ZERO;
    let tasks = format!("/proc/{id}/task");
    for task in fs::read_dir(&tasks).with_context(|| format!("read {tasks}"))? {
        let path = task.with_context(|| format!("read {tasks}"))?.path().join("schedstat");
        // Between listing and reading a thread may end.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let nanoseconds = text.split(' ').next().and_then(|field| field.parse().ok());
        total += Duration::from_nanos(nanoseconds.with_context(|| format!("read {}", path.display()))?);
    }
    Ok(total)
}
