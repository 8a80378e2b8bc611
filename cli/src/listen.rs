//! Listeners, bound here so that a failure names the flag.

use anyhow::bail;
use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};
use tokio::net::TcpListener;

/// Binds `address`, which `flag` asked for.
///
/// # Errors
/// Names the flag, the address and what to do about it.
pub(crate) async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let problem = match TcpListener::bind(address).await {
        Ok(listener) => return Ok(listener),
        Err(problem) => problem,
    };
    let port = address.port();
    match problem.kind() {
        ErrorKind::AddrInUse => bail!(
            "{flag} {address}: another process listens there; stop it, or choose another port ({flag} {}:0 takes a free one)",
            host(address.ip())
        ),
        ErrorKind::PermissionDenied => bail!("{flag} {address}: port {port} is privileged; choose one from 1024 on"),
        ErrorKind::AddrNotAvailable => {
            bail!("{flag} {address}: this machine has no such address; 0.0.0.0 means all it has")
        }
        _ => bail!("{flag} {address}: {problem}"),
    }
}

/// Returns the address that a client on this machine can use for a listener bound to `address`.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
    SocketAddr::new(ip, address.port())
}

/// Writes an address as it stands in a URL.
fn host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_names_the_flag_and_the_way_out() {
        let taken = bind("--listen", SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("loopback has free ports");
        let address = taken.local_addr().expect("a bound socket has an address");
        let message = bind("--listen", address).await.expect_err("the port is taken").to_string();
        assert!(
            message.contains(&format!("--listen {address}")) && message.contains("--listen 127.0.0.1:0"),
            "{message}"
        );
    }

    #[test]
    fn all_addresses_are_reached_by_loopback() {
        assert_eq!(reachable(SocketAddr::from(([0, 0, 0, 0], 80))), SocketAddr::from(([127, 0, 0, 1], 80)));
        assert_eq!(reachable(SocketAddr::from(([10, 0, 0, 7], 80))), SocketAddr::from(([10, 0, 0, 7], 80)));
    }
}
