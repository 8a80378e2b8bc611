//! What can go wrong in the engine, by what the caller does about it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// An engine error. None of them is worth retrying with the same input.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be used; the message names the file, the field and the value.
    #[error("{path}: {problem}")]
    Checkpoint {
        /// File or directory at fault.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A setting does not fit the model or the machine.
    #[error("setting {field}: {problem}")]
    Setting {
        /// Field of [`crate::Config`].
        field: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A row of a step holds something no model could compute (a token outside the vocabulary, a position past the end).
    #[error("{0}")]
    Row(String),
    /// The machine refused something (memory, a thread).
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The card refused something, or broke.
    #[error("{card}: {action}: {problem}")]
    Card {
        /// Which.
        card: String,
        /// What was tried.
        action: String,
        /// What the driver said, and what to do about it where that is known.
        problem: String,
    },
}

impl Error {
    pub(crate) fn checkpoint(path: &Path, problem: impl fmt::Display) -> Self {
        Error::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
    }

    pub(crate) fn setting(field: &'static str, problem: impl fmt::Display) -> Self {
        Error::Setting { field, problem: problem.to_string() }
    }

    pub(crate) fn card(card: &str, action: &str, problem: String) -> Self {
        Error::Card { card: card.to_owned(), action: action.to_owned(), problem }
    }

    /// Says what was tried when the system refused.
    pub(crate) fn system(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Error::System { action, source }
    }
}
