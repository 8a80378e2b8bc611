//! How others reach a listener.

use std::net::SocketAddr;

/// Returns `host:port` for others: `advertise` as it is when it names a port, with the bound port when it is only a host, and
/// the bound address when there is none.
pub fn advertised(advertise: Option<&str>, bound: SocketAddr) -> String {
    let Some(host) = advertise else { return bound.to_string() };
    let has_port = match host.rsplit_once(':') {
        // A bare IPv6 address has colons and no port; with a port it wears brackets.
        Some((name, port)) => (!name.contains(':') || name.ends_with(']')) && port.parse::<u16>().is_ok(),
        None => false,
    };
    match host {
        _ if has_port => host.to_owned(),
        _ if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", bound.port()),
        _ => format!("{host}:{}", bound.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_port_completes_a_host() {
        let bound: SocketAddr = "127.0.0.1:7001".parse().unwrap();
        let check = |advertise, expected: &str| assert_eq!(advertised(advertise, bound), expected);
        check(None, "127.0.0.1:7001");
        check(Some("worker-3.prefill"), "worker-3.prefill:7001");
        check(Some("worker-3:9000"), "worker-3:9000");
        check(Some("fd00::3"), "[fd00::3]:7001");
        check(Some("[fd00::3]:9000"), "[fd00::3]:9000");
    }
}
