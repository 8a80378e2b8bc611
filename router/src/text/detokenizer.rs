//! Tokens to text, one token at a time, without ever showing half a character.
//!
//! Byte-level tokenizers (GPT-2 and its heirs) get the direct way: a token is bytes, and what is complete UTF-8 goes out. All
//! others get the prefix and read offset method of Hugging Face's text streamer: decode a short window with and without
//! the new tokens, and release the difference once it does not end in a replacement character.

use super::tokenizer::Tokenizer;
use kv_cache::TokenId;
use std::sync::Arc;

/// How many prompt tokens give the first output token its context: with some tokenizers a leading space is only visible
/// behind another token.
const PRIMING_TOKENS: usize = 6;

/// Tokens that may wait for a character to be completed. UTF-8 needs four at most; more means the bytes are broken.
const MAX_PENDING_TOKENS: usize = 64;

/// The text of one growing sequence.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    skip_special: bool,
    /// Special tokens that are shown all the same.
    shown: Arc<[TokenId]>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes that are not yet a whole character; at most three.
    Bytes(Vec<u8>),
    /// Tokens of the window; the first `read` of them are already shown.
    Window { tokens: Vec<TokenId>, read: usize },
}

impl Detokenizer {
    /// Starts behind `prompt`, whose text is not repeated.
    pub(crate) fn new(tokenizer: &Tokenizer, prompt: &[TokenId], skip_special: bool) -> Self {
        let tail = &prompt[prompt.len().saturating_sub(PRIMING_TOKENS)..];
        let mut this = Self { skip_special, shown: Arc::default(), state: State::Bytes(Vec::new()) };
        if tokenizer.is_byte_level() {
            let mut shown = String::new();
            tail.iter().for_each(|&token| this.push(tokenizer, token, &mut shown));
        } else {
            let tokens: Vec<_> = tail.iter().copied().filter(|&t| !this.skips(tokenizer, t)).collect();
            this.state = State::Window { read: tokens.len(), tokens };
        }
        this
    }

    /// Shows `tokens` even where special tokens are skipped.
    pub(crate) fn showing(self, tokens: Arc<[TokenId]>) -> Self {
        Self { shown: tokens, ..self }
    }

    /// Takes the next token and appends to `out` the text that is now certain.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, out: &mut String) {
        if self.skips(tokenizer, token) {
            if self.shown.contains(&token) {
                self.finish(tokenizer, out);
                out.push_str(&String::from_utf8_lossy(tokenizer.bytes(token)));
            }
            return;
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend_from_slice(tokenizer.bytes(token));
                drain_utf8(pending, out);
            }
            State::Window { tokens, read } => {
                tokens.push(token);
                let shown = tokenizer.decode(&tokens[..*read], self.skip_special);
                let text = tokenizer.decode(tokens, self.skip_special);
                let complete = !text.ends_with('\u{fffd}') || tokens.len() - *read >= MAX_PENDING_TOKENS;
                if complete && text.len() > shown.len() {
                    out.push_str(from_char_boundary(&text, shown.len()));
                    tokens.drain(..*read);
                    *read = tokens.len();
                }
            }
        }
    }

    /// Appends what was held back for a character that never came to its end.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) {
        match &mut self.state {
            State::Bytes(pending) => {
                out.push_str(&String::from_utf8_lossy(pending));
                pending.clear();
            }
            State::Window { tokens, read } => {
                let shown = tokenizer.decode(&tokens[..*read], self.skip_special);
                let text = tokenizer.decode(tokens, self.skip_special);
                out.push_str(from_char_boundary(&text, shown.len()));
                *read = tokens.len();
            }
        }
    }

    fn skips(&self, tokenizer: &Tokenizer, token: TokenId) -> bool {
        self.skip_special && tokenizer.is_special(token)
    }
}

/// Moves whole characters from `pending` to `out`; broken ones become U+FFFD, one for each maximal broken part, as in
/// `String::from_utf8_lossy` over the whole.
fn drain_utf8(pending: &mut Vec<u8>, out: &mut String) {
    let mut done = 0;
    while done < pending.len() {
        match std::str::from_utf8(&pending[done..]) {
            Ok(text) => {
                out.push_str(text);
                done = pending.len();
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                out.push_str(std::str::from_utf8(&pending[done..valid]).unwrap_or_default());
                done = valid;
                match error.error_len() {
                    Some(broken) => {
                        out.push('\u{fffd}');
                        done += broken;
                    }
                    None => break,
                }
            }
        }
    }
    pending.drain(..done);
}

/// Returns `text` from the first character boundary at or after `from`: the window's text may change where it was shown,
/// when a decoder joins pieces.
fn from_char_boundary(text: &str, mut from: usize) -> &str {
    while from < text.len() && !text.is_char_boundary(from) {
        from += 1;
    }
    text.get(from..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_split_of_bytes_reads_like_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..64), cuts in proptest::collection::vec(1usize..5, 0..64)) {
            let (mut pending, mut out, mut rest) = (Vec::new(), String::new(), &bytes[..]);
            let mut cuts = cuts.into_iter();
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                pending.extend_from_slice(head);
                drain_utf8(&mut pending, &mut out);
                rest = tail;
            }
            out.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn valid_text_never_shows_a_replacement(text in "\\PC{0,40}") {
            let (mut pending, mut out) = (Vec::new(), String::new());
            for byte in text.bytes() {
                pending.push(byte);
                drain_utf8(&mut pending, &mut out);
                prop_assert!(!out.contains(char::REPLACEMENT_CHARACTER) || text.contains(char::REPLACEMENT_CHARACTER));
            }
            prop_assert_eq!(out, text);
        }
    }
}
