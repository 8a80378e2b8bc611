//! The directory over etcd.
//!
//! A member is one key, `/baton/<cluster>/members/<id>`, whose value is the [`Member`] as JSON and whose life is a lease that
//! the member's process keeps alive. Three parts share the work:
//!
//! - `connection.rs`: clients, time limits, waiting between attempts, and what the log says about an outage;
//! - `registrar.rs`: one task per registration, which takes the key and keeps it;
//! - `watcher.rs`: one task per directory, which lists and watches the members and merges them into the view.
//!
//! Both tasks are loops over a *session*: connect, work until something fails, drop the client, wait a little, again. A session
//! starts from nothing but what etcd says, so a restarted, restored or emptied etcd is no special case. Any failure, a time
//! limit included, ends the session, and no channel outlives it: a channel that has lost its server is not worth reviving.
//!
//! The watcher starts with the first [`Directory::watch`]. Workers never watch; if they did, each load report would go to every
//! worker, and etcd's work would grow with the square of the fleet.
//!
//! Asks for etcd 3.4 or newer (progress requests on watches).

mod connection;
mod registrar;
mod watcher;

use crate::{Directory, Error, Member, Registration, View, directory::check_name, registration::Wanted};
use async_trait::async_trait;
use connection::Connector;
use registrar::Registrar;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::sync::{oneshot, watch};
use watcher::Watcher;

/// Where etcd is and how this cluster uses it.
#[derive(Clone, Debug, PartialEq)]
pub struct EtcdConfig {
    /// `http://host:port` or `host:port`, one or more members of one etcd.
    pub endpoints: Vec<String>,
    /// Name of the cluster: several may share an etcd. One segment of a key.
    pub cluster: String,
    /// Time to live of a member's lease: how long after the death of a process its key stays. Whole seconds, 1 s to 1 h.
    /// Shorter notices death sooner, but a member that cannot reach etcd for so long is dropped though it lives.
    pub lease_ttl: Duration,
}

impl EtcdConfig {
    /// The defaults for `cluster` on `endpoints`: leases of 5 s.
    pub fn new(endpoints: Vec<String>, cluster: &str) -> Self {
        Self { endpoints, cluster: cluster.into(), lease_ttl: Duration::from_secs(5) }
    }
}

/// Members in etcd, under a lease.
#[derive(Debug)]
pub struct EtcdDirectory {
    connector: Arc<Connector>,
    /// What the watcher keeps, once it has been started.
    view: OnceLock<watch::Receiver<Arc<View>>>,
}

impl EtcdDirectory {
    /// Makes the directory of `cluster` on the etcd at `endpoints`, with default settings. See [`EtcdDirectory::with_config`].
    pub fn connect(endpoints: Vec<String>, cluster: &str) -> Result<Self, Error> {
        Self::with_config(EtcdConfig::new(endpoints, cluster))
    }

    /// Checks `config` and makes the directory. Does not wait for etcd: registrations and the view come to life when it can be
    /// reached, and the log says so while it cannot.
    pub fn with_config(config: EtcdConfig) -> Result<Self, Error> {
        check_name("cluster name", &config.cluster)?;
        if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&config.lease_ttl) {
            return Err(Error::LeaseTtl { ttl: config.lease_ttl });
        }
        if config.endpoints.is_empty() {
            return Err(Error::Endpoint { endpoint: String::new(), problem: "no endpoint is given".into() });
        }
        config.endpoints.iter().try_for_each(|endpoint| check_endpoint(endpoint))?;
        Ok(Self { connector: Arc::new(Connector::new(config)), view: OnceLock::new() })
    }
}

#[async_trait]
impl Directory for EtcdDirectory {
    async fn register(&self, member: Member) -> Result<Registration, Error> {
        check_name("member id", &member.id)?;
        let wanted = Wanted { state: member.state, load: member.load.clone() };
        let (first, outcome) = oneshot::channel();
        let connector = self.connector.clone();
        let registration = Registration::spawn(wanted, member.incarnation, |publisher| {
            Registrar::new(connector, member, publisher, first).run()
        });
        // Every attempt is bounded, so the registrar answers within seconds; it hangs up only if the runtime is going down.
        outcome.await.unwrap_or(Ok(())).map(|()| registration)
    }

    /// Returns the latest view and its changes. The first call starts watching, which goes on while the directory or any receiver
    /// lives; it must come from within a tokio runtime.
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        let start = || {
            let (watcher, view) = Watcher::new(self.connector.clone());
            tokio::spawn(watcher.run());
            view
        };
        self.view.get_or_init(start).clone()
    }
}

/// Checks that `endpoint` is `[http://]host:port`.
fn check_endpoint(endpoint: &str) -> Result<(), Error> {
    let refuse = |problem: &str| Err(Error::Endpoint { endpoint: without_password(endpoint), problem: problem.into() });
    let authority = match endpoint.split_once("://") {
        None => endpoint,
        Some(("http", rest)) => rest.strip_suffix('/').unwrap_or(rest),
        Some(("https", _)) => return refuse("this build speaks http to etcd; put TLS between the hosts"),
        Some(_) => return refuse("the scheme must be http"),
    };
    if authority.contains('@') {
        return refuse("user names and passwords are not supported");
    }
    let Some((host, port)) = authority.rsplit_once(':') else {
        return refuse("expected http://host:port, but there is no port");
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host.contains(['/', '?', '#', ' ']) || (host.contains(':') && !bracketed) {
        return refuse("expected http://host:port");
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(()),
        _ => refuse("the port must be a number from 1 to 65535"),
    }
}

/// Returns the endpoint as it may be shown: whoever wrote a password before the host does not want it in a log.
fn without_password(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((_, host)) => format!("***@{host}"),
        None => endpoint.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_repeated() {
        let error = check_endpoint("http://user:secret@etcd:2379").expect_err("not supported").to_string();
        assert_eq!(error, "etcd endpoint \"***@etcd:2379\": user names and passwords are not supported");
    }

    #[test]
    fn endpoints_are_checked_before_anything_waits_for_them() {
        fn check(endpoint: &str, expected: Option<&str>) {
            let problem = check_endpoint(endpoint).err().map(|error| error.to_string());
            let expected = expected.map(|problem| format!("etcd endpoint {endpoint:?}: {problem}"));
            assert_eq!(problem, expected);
        }
        check("http://127.0.0.1:2379", None);
        check("http://etcd-0.etcd:2379/", None);
        check("etcd:2379", None);
        check("http://[::1]:2379", None);
        check("http://etcd", Some("expected http://host:port, but there is no port"));
        check("", Some("expected http://host:port, but there is no port"));
        check("http://:2379", Some("expected http://host:port"));
        check("http://::1:2379", Some("expected http://host:port"));
        check("http://etcd:2379/v3", Some("the port must be a number from 1 to 65535"));
        check("http://a/b:2379", Some("expected http://host:port"));
        check("http://etcd:0", Some("the port must be a number from 1 to 65535"));
        check("http://etcd:99999", Some("the port must be a number from 1 to 65535"));
        check("https://etcd:2379", Some("this build speaks http to etcd; put TLS between the hosts"));
        check("ftp://etcd:2379", Some("the scheme must be http"));
    }

    #[test]
    fn settings_are_checked() {
        fn check(change: impl FnOnce(&mut EtcdConfig), expected: &str) {
            let mut config = EtcdConfig::new(vec!["http://etcd:2379".into()], "baton");
            change(&mut config);
            let error = EtcdDirectory::with_config(config).expect_err(expected);
            assert_eq!(error.to_string(), expected);
        }
        check(|config| config.endpoints.clear(), "etcd endpoint \"\": no endpoint is given");
        check(
            |config| config.endpoints.push("x".into()),
            "etcd endpoint \"x\": expected http://host:port, but there is no port",
        );
        check(|config| config.cluster.clear(), "cluster name \"\": it is empty");
        check(
            |config| config.lease_ttl = Duration::from_millis(10),
            "lease time to live 10ms: it must be between 1 second and 1 hour",
        );
    }
}
