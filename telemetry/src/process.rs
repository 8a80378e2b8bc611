//! Memory, CPU time and files of this process, under the names every Prometheus client uses.
//!
//! Read from `/proc` when metrics are rendered; where there is no `/proc`, there are no such metrics. They are written as text here
//! because CPU time is a counter of fractions, which the registry does not have.

use std::{fmt::Write, fs, sync::OnceLock};

/// Ticks per second in `/proc`: fixed to 100 in Linux's interface to programs on every architecture this runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What `/proc/self` says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Usage {
    resident_bytes: Option<u64>,
    virtual_bytes: Option<u64>,
    threads: Option<u64>,
    cpu_seconds: Option<f64>,
    start_time_seconds: Option<f64>,
    open_files: Option<u64>,
    max_files: Option<u64>,
}

/// Renders them as Prometheus text.
pub(crate) fn render() -> String {
    text(&usage())
}

fn usage() -> Usage {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (stat, status) = (read("/proc/self/stat"), read("/proc/self/status"));
    Usage {
        resident_bytes: status_kib(&status, "VmRSS:").map(|kib| kib << 10),
        virtual_bytes: status_kib(&status, "VmSize:").map(|kib| kib << 10),
        threads: stat_field(&stat, 20),
        // User and system time.
        cpu_seconds: stat_field(&stat, 14).zip(stat_field(&stat, 15)).map(|(user, system)| seconds(user + system)),
        start_time_seconds: boot_time_seconds().zip(stat_field(&stat, 22)).map(|(boot, start)| boot + seconds(start)),
        // One of the entries is the handle that reads them.
        open_files: fs::read_dir("/proc/self/fd").ok().map(|entries| (entries.count() as u64).saturating_sub(1)),
        max_files: max_files(&read("/proc/self/limits")),
    }
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / TICKS_PER_SECOND
}

/// Returns a numeric field of `/proc/self/stat`, counted from 1 as proc(5) does. The second is the program's name in
/// parentheses, which may hold anything, so counting starts behind the last parenthesis.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(number - 3)?.parse().ok()
}

/// Returns a line of `/proc/self/status` that is given in kB, which there means KiB.
fn status_kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Returns the soft limit of open files.
fn max_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn boot_time_seconds() -> Option<f64> {
    static BOOT_TIME: OnceLock<Option<f64>> = OnceLock::new();
    *BOOT_TIME.get_or_init(|| {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
    })
}

fn text(usage: &Usage) -> String {
    let whole = |value: Option<u64>| value.map(|value| value as f64);
    let metrics = [
        ("process_resident_memory_bytes", "gauge", "Memory in RAM.", whole(usage.resident_bytes)),
        ("process_virtual_memory_bytes", "gauge", "Address space.", whole(usage.virtual_bytes)),
        ("process_threads", "gauge", "Threads.", whole(usage.threads)),
        ("process_cpu_seconds_total", "counter", "User and system CPU time.", usage.cpu_seconds),
        ("process_start_time_seconds", "gauge", "Start, since the Unix epoch.", usage.start_time_seconds),
        ("process_open_fds", "gauge", "Open files.", whole(usage.open_files)),
        ("process_max_fds", "gauge", "Most open files allowed.", whole(usage.max_files)),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in metrics {
        if let Some(value) = value {
            writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}")
                .expect("writing to a string cannot fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_stat_are_found_behind_any_name() {
        let stat =
            "42 (a) (b c) S 1 42 42 0 -1 4194304 100 0 0 0 1234 66 0 0 20 0 7 0 987654 1000 250 18446744073709551615";
        assert_eq!(stat_field(stat, 14), Some(1234));
        assert_eq!(stat_field(stat, 15), Some(66));
        assert_eq!(stat_field(stat, 20), Some(7));
        assert_eq!(stat_field(stat, 22), Some(987654));
        assert_eq!(stat_field(stat, 99), None);
        assert_eq!(stat_field("", 14), None);
    }

    #[test]
    fn status_and_limits() {
        assert_eq!(status_kib("VmSize:\t  900 kB\nVmRSS:\t   12 kB\n", "VmRSS:"), Some(12));
        assert_eq!(status_kib("", "VmRSS:"), None);
        assert_eq!(
            max_files("Max open files            1024                 1048576              files\n"),
            Some(1024)
        );
        assert_eq!(max_files("Max open files            unlimited            unlimited            files\n"), None);
    }

    #[test]
    fn what_is_unknown_is_left_out() {
        assert_eq!(text(&Usage::default()), "");
        let text = text(&Usage { cpu_seconds: Some(1.25), ..Usage::default() });
        assert_eq!(
            text,
            "# HELP process_cpu_seconds_total User and system CPU time.\n\
             # TYPE process_cpu_seconds_total counter\n\
             process_cpu_seconds_total 1.25\n"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_plausible() {
        let usage = usage();
        assert!(usage.resident_bytes.is_some_and(|bytes| bytes > 100 << 10), "{usage:?}");
        assert!(usage.threads.is_some_and(|threads| threads >= 1), "{usage:?}");
        assert!(usage.open_files.is_some_and(|files| files >= 3), "{usage:?}");
        assert!(usage.cpu_seconds.is_some_and(|seconds| (0.0..3600.0).contains(&seconds)), "{usage:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
        assert!(usage.start_time_seconds.is_some_and(|start| (start - now).abs() < 3600.0), "{usage:?}");
    }
}
