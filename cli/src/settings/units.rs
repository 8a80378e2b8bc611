//! Sizes, durations and addresses as people write them.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    str::FromStr,
    time::Duration,
};

/// A size in bytes, written `512MiB`, `2GiB`, `1.5GB` or as a bare number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

const SIZE_UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        scale(text, &SIZE_UNITS)
            .map(|bytes| Self(bytes as u64))
            .ok_or_else(|| "expected a size such as 512MiB, 2GiB or a number of bytes".into())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let power = (0..UNITS.len() - 1).take_while(|power| self.0 >> (10 * (power + 1)) != 0).count();
        let value = self.0 as f64 / (1_u64 << (10 * power)) as f64;
        let decimals = usize::from(value.fract() >= 0.05 && value < 100.0);
        write!(out, "{value:.decimals$} {}", UNITS[power])
    }
}

const TIME_UNITS_MS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

/// Reads a duration written `500ms`, `30s`, `2m` or `1h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    scale(text, &TIME_UNITS_MS)
        .map(|milliseconds| Duration::from_millis(milliseconds as u64))
        .ok_or_else(|| "expected a duration with its unit, such as 500ms, 30s or 2m".into())
}

/// Reads a number and its unit; `None` when either is unknown or the value is not a positive finite one.
fn scale(text: &str, units: &[(&str, u64)]) -> Option<f64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let value = number.parse::<f64>().ok()? * *factor as f64;
    (value.is_finite() && value < u64::MAX as f64).then_some(value)
}

/// Reads `HOST:PORT`, resolving a host name (IPv4 first, as clients try `localhost` that way).
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    const EXPECTED: &str = "expected HOST:PORT such as 127.0.0.1:8000, port 0 for a free one";
    let mut found: Vec<_> = text.to_socket_addrs().map_err(|problem| format!("{EXPECTED} ({problem})"))?.collect();
    found.sort_by_key(|address| !address.is_ipv4());
    found.first().copied().ok_or_else(|| EXPECTED.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_size(text: &str, expected: Option<u64>) {
        assert_eq!(text.parse::<Bytes>().ok().map(|bytes| bytes.0), expected, "{text:?}");
    }

    #[test]
    fn sizes_are_read() {
        check_size("512MiB", Some(512 << 20));
        check_size("1.5 GiB", Some(3 << 29));
        check_size("2gb", Some(2_000_000_000));
        check_size("4096", Some(4096));
        for wrong in ["", "MiB", "-1", "12 parsecs", "1e9", "99999999999TiB", "1.2.3"] {
            check_size(wrong, None);
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_fitting_unit() {
        for (bytes, expected) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (512 << 20, "512 MiB"), (3 << 29, "1.5 GiB")]
        {
            assert_eq!(Bytes(bytes).to_string(), expected);
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["30", "s", "-3s", "3 fortnights"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn addresses_need_a_port() {
        assert_eq!(address("127.0.0.1:80"), Ok(SocketAddr::from(([127, 0, 0, 1], 80))));
        assert_eq!(address("localhost:0").map(|address| address.ip().is_loopback()), Ok(true));
        assert!(address("127.0.0.1").is_err());
        assert!(address("127.0.0.1:99999").is_err());
    }
}
