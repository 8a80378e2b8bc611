//! What a step must keep to, and which row does not.

use super::Row;
use crate::{Config, Error, Model};
use kv_cache::PageLayout;

/// What a step must keep to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_model_len: usize,
    pub(super) token_budget: usize,
    pub(super) max_sequences: usize,
    pub(super) vocab_size: usize,
    pub(super) page_tokens: usize,
    pub(super) pages: usize,
}

/// Rows of logits that are computed at a time, unless the batch has more sequences: what a few drafts take. A prompt whose every
/// position is asked for would fill gigabytes.
const LOGITS_ROWS: usize = 32;

impl Limits {
    /// A `timed` engine may be told to take longer sequences than the checkpoint was made for.
    pub(super) fn new(model: &Model, config: &Config, layout: &PageLayout, timed: bool) -> Result<Self, Error> {
        for (field, value) in [("token_budget", config.token_budget), ("max_sequences", config.max_sequences)] {
            if value == 0 {
                return Err(Error::setting(field, "0 leaves nothing to compute"));
            }
        }
        let longest = model.decoder.max_position;
        let room = layout.pages as usize * layout.page_tokens as usize;
        let max_model_len = match config.max_model_len.map(|len| len as usize) {
            Some(0) => return Err(Error::setting("max_model_len", "0 leaves no room for a token")),
            Some(len) if len > longest && !timed => {
                let problem = format!("{len} tokens are more than the checkpoint was made for, {longest}");
                return Err(Error::setting("max_model_len", problem));
            }
            Some(len) if len > room => {
                let problem = format!("{len} tokens need more pages than kv_bytes gives; they hold {room} tokens");
                return Err(Error::setting("max_model_len", problem));
            }
            Some(len) => len,
            None => longest.min(room),
        };
        Ok(Self {
            max_model_len,
            token_budget: config.token_budget as usize,
            max_sequences: config.max_sequences as usize,
            vocab_size: model.decoder.vocab_size,
            page_tokens: layout.page_tokens as usize,
            pages: layout.pages as usize,
        })
    }

    /// Says which row could not be computed, and why.
    pub(super) fn check(&self, rows: &[Row<'_>]) -> Result<(), Error> {
        if rows.len() > self.max_sequences {
            return Err(Error::Row(format!("{} rows in a step of at most {}", rows.len(), self.max_sequences)));
        }
        let total: usize = rows.iter().map(|row| row.tokens.len()).sum();
        if total > self.token_budget {
            return Err(Error::Row(format!("{total} tokens in a step of at most {}", self.token_budget)));
        }
        for (index, row) in rows.iter().enumerate() {
            self.check_row(row).map_err(|problem| Error::Row(format!("row {index}: {problem}")))?;
        }
        Ok(())
    }

    /// Returns how many rows of logits are computed at a time.
    pub(super) fn logits_rows(&self) -> usize {
        self.max_sequences.max(LOGITS_ROWS).min(self.token_budget)
    }

    fn check_row(&self, row: &Row<'_>) -> Result<(), String> {
        if row.tokens.is_empty() {
            return Err("no tokens to compute".into());
        }
        let end = row.start.saturating_add(row.tokens.len());
        if end > self.max_model_len {
            return Err(format!("{end} tokens are more than the longest sequence, {}", self.max_model_len));
        }
        let targets = row.prompt_logprobs.map_or(&[][..], |wanted| wanted.targets);
        if let Some(token) = row.tokens.iter().chain(targets).find(|token| **token as usize >= self.vocab_size) {
            return Err(format!("token {token} is outside the vocabulary of {}", self.vocab_size));
        }
        if row.drafts >= row.tokens.len() {
            return Err(format!("{} drafts among {} tokens leave none to draw after", row.drafts, row.tokens.len()));
        }
        if row.pooling.is_some() && (row.sample.is_some() || row.prompt_logprobs.is_some()) {
            return Err("hidden states are asked for, and what is made of logits as well".into());
        }
        let last = row.first_drawn();
        match row.sample {
            Some(sample) if !sample.history.ends_with(&row.tokens[last + 1..]) => {
                return Err(format!("its {} drafts do not end its history", row.drafts));
            }
            None if row.drafts > 0 => return Err(format!("{} drafts and nothing to verify them by", row.drafts)),
            _ => {}
        }
        let most = if row.sample.is_some() { last } else { row.tokens.len() };
        if targets.len() > most {
            return Err(format!("{} log-probabilities of a prompt asked of {most} tokens", targets.len()));
        }
        let needed = end.div_ceil(self.page_tokens);
        if row.pages.len() < needed {
            return Err(format!("{} pages do not hold {end} tokens; {needed} are needed", row.pages.len()));
        }
        if let Some(page) = row.pages[..needed].iter().find(|page| page.index() >= self.pages) {
            return Err(format!("page {} is outside the pool of {}", page.0, self.pages));
        }
        Ok(())
    }
}
