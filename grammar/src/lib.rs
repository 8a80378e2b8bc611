//! Grammars: which tokens may follow, so that what is generated fits a JSON schema, a regular expression or a grammar.
//!
//! A [`Spec`] is what a request says. [`Grammars`] compiles it against a model's [`TokenTable`], once for all sequences that
//! say the same, on threads of its own and within [`Limits`]. A [`Matcher`] is one sequence's place in a [`Grammar`]: it says which
//! tokens may come next ([`Matcher::masks`]), and goes on by the token that came ([`Matcher::advance`]). Its state is a function of the
//! tokens alone, so another worker rebuilds it by replaying them.
//!
//! Two crates need this, and neither may know the other: the router, to refuse what cannot be compiled before anybody
//! is asked to compute, and the engine, whose sampling the masks restrict. The parsing is `llguidance`; what is here bounds it in
//! size and time, keeps its panics to itself, refuses what it would silently drop, and keeps sequences apart from each
//! other's caches.
#![forbid(unsafe_code)]

mod compile;
mod ebnf;
mod matcher;
mod schema;
mod spec;
mod spelling;
mod thoughts;
mod tokens;

pub use compile::{Grammar, Grammars, Limits};
pub use kv_cache::TokenId;
pub use matcher::{Mask, Masks, Matcher};
pub use spec::{Kind, Spec, Thoughts};
pub use spelling::token_bytes;
pub use tokens::TokenTable;

/// Why there is no grammar, or no way on in one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text cannot be compiled, here or anywhere.
    #[error("{0}")]
    Invalid(String),
    /// A sequence cannot go on: a token that the grammar does not allow, or a state too large to compute.
    #[error("{0}")]
    Lost(String),
    /// Too many texts wait to be compiled.
    #[error("{0} grammars wait to be compiled already")]
    Busy(usize),
    /// The model's tokens are not known, so no grammar can be compiled.
    #[error("{0}")]
    Tokens(String),
}

/// Most characters of a message of `llguidance`; some repeat the whole grammar.
const MESSAGE_CHARS: usize = 400;

/// Runs `work`, which may panic on odd input, and cuts what it complains about to a readable length.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let result = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("the parser gave up: {}", text.unwrap_or("no reason given")))
    });
    result.map_err(|message| {
        // The crate marks where it left out its state, and adds where it panicked.
        let message = ["\n<non-verbose/>", "\n<backtrace>"]
            .iter()
            .fold(&message[..], |m, mark| m.split(mark).next().unwrap_or(m));
        let message = message.trim();
        match message.char_indices().nth(MESSAGE_CHARS) {
            Some((end, _)) => format!("{}…", &message[..end]),
            None => message.to_owned(),
        }
    })
}
