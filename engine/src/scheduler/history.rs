//! A sequence's tokens and the names of its full pages.

use kv_cache::{PageHash, PrefixHasher, TokenId};

/// Tokens in order, each full page of them hashed once.
///
/// Hashing a long prompt takes longer than planning a step, so a history is made where the request arrives and not on
/// the thread that steps.
///
/// Drafts, guesses at the tokens to come, may follow; only their own step sees them, and they never get a name.
#[derive(Clone, Debug)]
pub struct History {
    /// Then the drafts.
    tokens: Vec<TokenId>,
    drafts: usize,
    hashes: Vec<PageHash>,
    hasher: PrefixHasher,
    page_tokens: usize,
}

impl History {
    /// Hashes the full pages of `tokens`; histories of different `salt` share no page.
    pub fn new(salt: &[u8], tokens: Vec<TokenId>, page_tokens: usize) -> Self {
        let mut hasher = PrefixHasher::new(salt);
        let hashes = tokens.chunks_exact(page_tokens).map(|page| hasher.push(page)).collect();
        Self { tokens, drafts: 0, hashes, hasher, page_tokens }
    }

    /// Returns all tokens, prompt first.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens[..self.len()]
    }

    /// Returns all tokens and the drafts after them.
    pub(super) fn with_drafts(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Returns how many drafts there are.
    pub(super) fn drafts(&self) -> usize {
        self.drafts
    }

    /// Puts `drafts` in place of those before.
    pub(super) fn guess(&mut self, drafts: &[TokenId]) {
        self.tokens.truncate(self.len());
        self.tokens.extend_from_slice(drafts);
        self.drafts = drafts.len();
    }

    /// Returns the names of the full pages.
    pub fn hashes(&self) -> &[PageHash] {
        &self.hashes
    }

    /// Returns how many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len() - self.drafts
    }

    /// Says whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how many pages hold `tokens` tokens.
    pub(super) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Returns how many leading full pages it has in common with `other`: a page's name stands for all before it.
    pub(super) fn common_pages(&self, other: &Self) -> usize {
        let both = self.hashes.len().min(other.hashes.len());
        let (mut same, mut different) = (0, both + 1);
        while same + 1 < different {
            let middle = (same + different) / 2;
            if self.hashes[middle - 1] == other.hashes[middle - 1] { same = middle } else { different = middle }
        }
        same
    }

    /// Returns the names a fresh sequence may look up: never the page of the last token, which must be computed because
    /// the next token is drawn from its logits.
    pub(super) fn reusable(&self) -> &[PageHash] {
        let most = self.len().saturating_sub(1) / self.page_tokens;
        &self.hashes[..most.min(self.hashes.len())]
    }

    /// Appends a token; the drafts are gone.
    pub(super) fn push(&mut self, token: TokenId) {
        self.guess(&[]);
        self.tokens.push(token);
        if self.tokens.len().is_multiple_of(self.page_tokens) {
            let start = self.tokens.len() - self.page_tokens;
            self.hashes.push(self.hasher.push(&self.tokens[start..]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_cache::page_hashes;

    #[test]
    fn a_grown_history_has_the_names_of_a_whole_one() {
        let tokens: Vec<TokenId> = (0..70).collect();
        let mut history = History::new(b"salt", tokens[..5].to_vec(), 16);
        tokens[5..].iter().for_each(|&token| history.push(token));
        assert_eq!(history.tokens(), tokens);
        assert_eq!(history.hashes(), page_hashes(b"salt", &tokens, 16));
    }

    #[test]
    fn drafts_get_no_name_and_leave_no_trace() {
        let mut history = History::new(b"", (0..15).collect(), 16);
        history.guess(&[7, 8, 9]);
        assert_eq!((history.len(), history.hashes().len(), history.with_drafts().len()), (15, 0, 18));
        history.guess(&[1]);
        history.push(15);
        assert_eq!((history.with_drafts(), history.drafts()), (&(0..16).collect::<Vec<_>>()[..], 0));
        assert_eq!(history.hashes(), page_hashes(b"", &(0..16).collect::<Vec<_>>(), 16));
    }

    #[test]
    fn common_pages_end_where_tokens_differ() {
        let history = |own: u32| History::new(b"", (0..40).chain([own; 40]).collect(), 8);
        assert_eq!(history(1).common_pages(&history(1)), 10);
        assert_eq!(history(1).common_pages(&history(2)), 5);
        assert_eq!(history(1).common_pages(&History::new(b"", (0..20).collect(), 8)), 2);
        assert_eq!(history(1).common_pages(&History::new(b"", vec![9; 80], 8)), 0);
    }

    #[test]
    fn the_page_of_the_last_token_is_never_reused() {
        let reusable = |tokens| History::new(b"", (0..tokens).collect(), 16).reusable().len();
        assert_eq!([1, 16, 17, 32, 33].map(reusable), [0, 0, 1, 1, 2]);
    }
}
