//! Names of a prompt's pages.
//!
//! Naming a page is a cryptographic hash, and a long prompt has hundreds that follow from each other. Prompts share beginnings, so the
//! names of a run of pages are remembered under the name before it and the tokens in it.

use crate::recent::Recent;
use kv_cache::{PageHash, PrefixHasher, TokenId};

/// Pages named in one go.
const RUN_PAGES: usize = 16;

/// Names pages, and remembers names.
#[derive(Debug)]
pub(crate) struct PageNames {
    recent: Recent<PageHash>,
}

impl PageNames {
    /// Remembers at most `budget_bytes`.
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self { recent: Recent::new(budget_bytes) }
    }

    /// Returns what `kv_cache::page_hashes` does: the names of all full pages of `tokens` behind `root`.
    pub(crate) fn of(&self, root: &[u8], tokens: &[TokenId], page_tokens: usize) -> Vec<PageHash> {
        let mut names = Vec::with_capacity(tokens.len() / page_tokens);
        let mut hasher = PrefixHasher::new(root);
        let runs = tokens.chunks_exact(RUN_PAGES * page_tokens);
        let rest = runs.remainder();
        let mut key = vec![0; 16 + 4 * RUN_PAGES * page_tokens];
        for run in runs {
            let (parent, content) = key.split_at_mut(16);
            parent.copy_from_slice(&hasher.parent().0.to_le_bytes());
            content.as_chunks_mut().0.iter_mut().zip(run).for_each(|(bytes, token)| *bytes = token.to_le_bytes());
            let before = names.len();
            if self.recent.get(&key, &mut names) {
                hasher = PrefixHasher::after(names[names.len() - 1]);
            } else {
                names.extend(run.chunks_exact(page_tokens).map(|page| hasher.push(page)));
                self.recent.insert(&key, &names[before..]);
            }
        }
        names.extend(rest.chunks_exact(page_tokens).map(|page| hasher.push(page)));
        names
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> usize {
        self.recent.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_are_those_of_plain_hashing(prompts in proptest::collection::vec((0usize..700, 0u32..3, 0usize..2), 1..8),
                                            page_tokens in 1usize..20, budget in 0usize..200_000) {
            let names = PageNames::new(budget);
            for (tokens, ending, root) in prompts {
                let mut tokens: Vec<TokenId> = (0..tokens as u32).collect();
                tokens.extend([ending; 40]);
                let root = [&b""[..], b"salt"][root];
                prop_assert_eq!(names.of(root, &tokens, page_tokens), kv_cache::page_hashes(root, &tokens, page_tokens));
            }
        }
    }
}
