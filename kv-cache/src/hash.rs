//! The name of a prefix.
//!
//! A page's hash covers its own tokens and, through the chain, every token before it, so equal hashes mean equal prefixes on
//! the router and on every worker. The hash is BLAKE3 cut to 128 bits: requests of different users meet in one cache, so
//! a collision must not be something one can construct.

use crate::TokenId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Name of the prefix that ends with a full page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PageHash(pub u128);

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Hashes a growing sequence page by page.
#[derive(Clone, Debug)]
pub struct PrefixHasher {
    parent: PageHash,
}

impl PrefixHasher {
    /// Starts a chain. Prefixes of different `salt` (cache salt, adapter) never meet; the empty salt is the common one.
    pub fn new(salt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("baton page hash v1");
        hasher.update(salt);
        Self { parent: cut(&hasher) }
    }

    /// Goes on behind a page.
    pub fn after(page: PageHash) -> Self {
        Self { parent: page }
    }

    /// Returns the hash of the last page; before the first, of the chain's root.
    pub fn parent(&self) -> PageHash {
        self.parent
    }

    /// Returns the hash of the next page, which holds `tokens`.
    pub fn push(&mut self, tokens: &[TokenId]) -> PageHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.parent.0.to_le_bytes());
        let mut bytes = [0u8; 4 * 64];
        for chunk in tokens.chunks(64) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(chunk) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..chunk.len() * 4]);
        }
        self.parent = cut(&hasher);
        self.parent
    }
}

fn cut(hasher: &blake3::Hasher) -> PageHash {
    let mut bytes = [0u8; 16];
    hasher.finalize_xof().fill(&mut bytes);
    PageHash(u128::from_le_bytes(bytes))
}

/// Returns the root of a sequence's chain: the request's own salt and, where an adapter changes what pages hold, its id.
pub fn root_salt(salt: &[u8], adapter: Option<&str>) -> Vec<u8> {
    match adapter {
        None => salt.to_vec(),
        // The length keeps apart what would read the same when joined.
        Some(id) => [salt, b"\0adapter\0", id.as_bytes(), &(id.len() as u64).to_le_bytes()].concat(),
    }
}

/// Returns the hashes of all full pages of `tokens`; a last, partly filled page has no name.
pub fn page_hashes(salt: &[u8], tokens: &[TokenId], page_tokens: usize) -> Vec<PageHash> {
    let mut hasher = PrefixHasher::new(salt);
    tokens.chunks_exact(page_tokens).map(|page| hasher.push(page)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_names_the_whole_prefix() {
        let tokens: Vec<TokenId> = (0..64).collect();
        let all = page_hashes(b"", &tokens, 16);
        assert_eq!(all.len(), 4);
        assert_eq!(page_hashes(b"", &tokens[..47], 16), all[..2]);
        assert_eq!(PrefixHasher::after(all[1]).push(&tokens[32..48]), all[2]);

        let mut other = tokens.clone();
        other[0] = 99;
        assert!(page_hashes(b"", &other, 16).iter().zip(&all).all(|(a, b)| a != b));
    }

    #[test]
    fn salts_keep_prefixes_apart() {
        let tokens: Vec<TokenId> = (0..16).collect();
        assert_ne!(page_hashes(b"", &tokens, 16), page_hashes(b"tenant", &tokens, 16));
        let roots =
            [root_salt(b"", None), root_salt(b"", Some("a")), root_salt(b"a", Some("")), root_salt(b"", Some("b"))];
        for (index, root) in roots.iter().enumerate() {
            assert!(!roots[..index].contains(root), "{root:?}");
        }
    }
}
