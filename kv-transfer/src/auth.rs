//! Whether the other end of a link belongs to this cluster: pure, but for reading the token.
//!
//! All workers of a cluster are given one token. Before anything is said about pages, each end proves that it has it:
//!
//! ```text
//! source                                          target
//!    │── Hello{ nonce, … } ─────────────────────────►│
//!    │◄───────────────────────── Challenge{ nonce } ─│   a stranger learns a random number, and no more
//!    │── Proof{ by source } ────────────────────────►│   wrong: Reject. Only now is the Hello considered
//!    │◄────────────────── Welcome{ by target, … } ───│   wrong: the source closes
//! ```
//!
//! A proof is a keyed BLAKE3 hash; its key is the *link's*, made of the token, the whole `Hello` and the challenge, so neither a
//! proof nor what it vouches for can be replayed or carried to another link. Every further connection of the link (data
//! connections, descriptors of shared memory, endpoints) proves by the same key that it is this link's, each under its own number
//! and each number once.
//!
//! Without a token the same happens with an empty one, which proves nothing to a stranger who asks, but still ties connections to
//! their link. A token keeps strangers out; it does not hide or protect what is said afterwards from somebody who can read or
//! change packets. That is what TLS is for; with both, both must hold.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::{fmt, path::Path};

/// Least length of a token: what `openssl rand -hex 8` prints.
const LEAST_TOKEN: usize = 16;

/// A number used once.
pub(crate) type Nonce = [u8; 32];

/// Key made of the cluster's token.
#[derive(Clone)]
pub(crate) struct ClusterKey {
    key: [u8; 32],
    /// Whether there is a token.
    given: bool,
}

impl ClusterKey {
    /// Reads the token in `file`, if one is named. White space around it does not count.
    pub(crate) fn read(file: Option<&Path>) -> Result<Self, Error> {
        let token = match file {
            None => String::new(),
            Some(file) => {
                let wrong = |reason: String| Error::ClusterToken { file: file.to_owned(), reason };
                let token = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
                match token.trim() {
                    token if token.len() < LEAST_TOKEN => {
                        return Err(wrong(format!("{} bytes, at least {LEAST_TOKEN} are wanted", token.len())));
                    }
                    token => token.to_owned(),
                }
            }
        };
        Ok(Self {
            key: blake3::derive_key("baton kv-transfer 2026-11-21 cluster token", token.as_bytes()),
            given: file.is_some(),
        })
    }

    /// Returns whether there is a token.
    pub(crate) fn given(&self) -> bool {
        self.given
    }

    /// Says why two ends cannot have the same token, as the target words it, or nothing when they can.
    pub(crate) fn compare(&self, theirs_given: bool) -> Result<(), String> {
        match (theirs_given, self.given) {
            (false, true) => Err("cluster token: you have none, ours has one (cluster_token_file)".into()),
            (true, false) => Err("cluster token: you have one, we have none (cluster_token_file)".into()),
            (true, true) | (false, false) => Ok(()),
        }
    }

    /// Returns the key of the link that these two frames began.
    pub(crate) fn link(&self, hello: &[u8], challenge: &Nonce) -> LinkKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        // The challenge first: it has one length, so nothing can be read as another pair.
        LinkKey(*hasher.update(challenge).update(hello).finalize().as_bytes())
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey {{ given: {} }}", self.given)
    }
}

/// What is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The sender said this link's `Hello`.
    Source,
    /// The sender answers it.
    Target,
    /// The connection is number so-and-so of this link.
    Connection(u32),
    /// The pool that is passed is the target's.
    Pool,
}

/// Key that only the two ends of one link have.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct LinkKey([u8; 32]);

impl LinkKey {
    /// Proves a claim.
    pub(crate) fn prove(&self, claim: Claim) -> Proof {
        Proof(*self.hash(claim).as_bytes())
    }

    /// Says whether `proof` is one of `claim`, in the same time whatever it is.
    pub(crate) fn check(&self, claim: Claim, proof: &Proof) -> bool {
        // `blake3::Hash` compares in constant time.
        self.hash(claim) == blake3::Hash::from_bytes(proof.0)
    }

    fn hash(&self, claim: Claim) -> blake3::Hash {
        let (kind, number) = match claim {
            Claim::Source => (0_u32, 0),
            Claim::Target => (1, 0),
            Claim::Connection(number) => (2, number),
            Claim::Pool => (3, 0),
        };
        let claim = u64::from(kind) << 32 | u64::from(number);
        blake3::keyed_hash(&self.0, &claim.to_le_bytes())
    }
}

impl fmt::Debug for LinkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkKey")
    }
}

/// Shows that its sender has a link's key. Compare it only by [`LinkKey::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proof(pub(crate) [u8; Proof::BYTES]);

impl Proof {
    /// Length on the wire.
    pub(crate) const BYTES: usize = 32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn key(token: &str) -> Result<ClusterKey, Error> {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        file.write_all(token.as_bytes()).expect("write");
        ClusterKey::read(Some(file.path()))
    }

    #[test]
    fn a_proof_holds_for_one_claim_of_one_link_of_one_cluster() {
        let [ours, other] = ["0123456789abcdef", "0123456789abcdeg"].map(|token| key(token).expect("long enough"));
        let link = ours.link(b"hello", &[7; 32]);
        let claims = [Claim::Source, Claim::Target, Claim::Connection(0), Claim::Connection(1), Claim::Pool];
        for claim in claims {
            let proof = link.prove(claim);
            for held in claims {
                assert_eq!(link.check(held, &proof), held == claim);
            }
            for (name, key) in [
                ("token", other.link(b"hello", &[7; 32])),
                ("hello", ours.link(b"hellO", &[7; 32])),
                ("challenge", ours.link(b"hello", &[8; 32])),
                ("none", ClusterKey::read(None).expect("no token").link(b"hello", &[7; 32])),
            ] {
                assert!(!key.check(claim, &proof), "another {name}");
            }
        }
    }

    #[test]
    fn white_space_around_a_token_does_not_count() {
        let [plain, padded] =
            ["0123456789abcdef", " 0123456789abcdef\r\n"].map(|token| key(token).expect("long enough"));
        assert_eq!(plain.link(b"", &[0; 32]), padded.link(b"", &[0; 32]));
    }

    #[test]
    fn a_bad_token_is_named_but_not_shown() {
        let error = key("  hunter2\n").expect_err("short").to_string();
        assert!(
            error.starts_with("cluster_token_file ") && error.ends_with(": 7 bytes, at least 16 are wanted"),
            "{error}"
        );
        let missing = ClusterKey::read(Some(Path::new("/nowhere/token"))).expect_err("missing").to_string();
        assert!(missing.starts_with("cluster_token_file /nowhere/token: "), "{missing}");
        let shown = format!("{:?}", key("0123456789abcdef").expect("long enough"));
        assert_eq!(shown, "ClusterKey { given: true }");
    }
}
