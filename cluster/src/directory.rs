//! The directory as its users see it.

use crate::{Member, Registration, View};
use async_trait::async_trait;
use std::sync::Arc;
use tokio::sync::watch;

/// A place where members register and see each other.
#[async_trait]
pub trait Directory: Send + Sync + std::fmt::Debug {
    /// Registers `member` and keeps it registered, through outages, until the [`Registration`] is left or dropped. After a
    /// lost lease it registers again under a larger incarnation.
    ///
    /// Where the directory cannot be reached, it returns a registration all the same, which takes effect when the directory
    /// appears. [`Error::Taken`] is returned when the id is alive at another address; a restart of the same slot (same id,
    /// same address, or an id whose holder stopped renewing its lease) takes over. Dropping the future leaves the directory.
    async fn register(&self, member: Member) -> Result<Registration, Error>;

    /// Returns the latest view and its changes. They go on while a receiver lives, also after the directory itself was dropped.
    fn watch(&self) -> watch::Receiver<Arc<View>>;
}

/// Why the directory refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not usable.
    #[error("etcd endpoint {endpoint:?}: {problem}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// A name cannot be part of a key.
    #[error("{field} {name:?}: {problem}")]
    Name {
        /// What the name is for: "cluster name" or "member id".
        field: &'static str,
        /// As given.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The time to live is not usable.
    #[error("lease time to live {ttl:?}: it must be between 1 second and 1 hour")]
    LeaseTtl {
        /// As given.
        ttl: std::time::Duration,
    },
    /// Somebody else is alive under this id.
    #[error("member id {id:?} is already registered at {address}; give this one another --name")]
    Taken {
        /// The id.
        id: String,
        /// Who has it.
        address: String,
    },
}

/// Checks that `name` can be one segment of a key.
pub(crate) fn check_name(field: &'static str, name: &str) -> Result<(), Error> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.contains('/') {
        "it contains a slash, which separates the parts of a key"
    } else if name.chars().any(char::is_control) {
        "it contains a control character"
    } else {
        return Ok(());
    };
    Err(Error::Name { field, name: name.into(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_segment_of_a_key() {
        fn check(name: &str, expected: Option<&str>) {
            let problem = check_name("member id", name).err().map(|error| error.to_string());
            assert_eq!(problem.as_deref(), expected, "{name:?}");
        }
        check("prefill-0", None);
        check("größe 1", None);
        check("", Some("member id \"\": it is empty"));
        check("a/b", Some("member id \"a/b\": it contains a slash, which separates the parts of a key"));
        check("a\nb", Some("member id \"a\\nb\": it contains a control character"));
    }
}
