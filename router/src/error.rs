//! Why a request was not answered. One variant for each reaction a client can have.

use std::time::Duration;

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// The request is wrong; sending it again will not help.
    #[error("{message}")]
    Invalid {
        message: String,
        /// The field at fault.
        param: Option<String>,
    },
    /// There is no such model.
    #[error("the model {0:?} does not exist; GET /v1/models lists those that do")]
    UnknownModel(String),
    /// What is named is not there.
    #[error("{0}")]
    NotFound(String),
    /// The body is larger than is taken.
    #[error("the request body is larger than {limit} bytes")]
    TooLarge { limit: usize },
    /// Too much is waiting already; the client should slow down.
    #[error("{waiting} requests are waiting already; try again later")]
    Overloaded { waiting: usize },
    /// Its first token would come later than the request wants it.
    #[error(
        "the first token is predicted {} ms after the request came, later than the {} ms it asks for; try again later or allow more time",
        .predicted.as_millis(), .wanted.as_millis()
    )]
    TooSlow { predicted: Duration, wanted: Duration },
    /// A key has used up what it may ask for.
    #[error("{message}")]
    RateLimited { message: String, retry_after: Duration },
    /// The client did not send its body.
    #[error("the request body did not come within {} ms", .0.as_millis())]
    SlowBody(Duration),
    /// Nobody can take the request now; it can be sent again.
    #[error("{message}")]
    Unavailable { message: String, retry_after: Duration },
    /// It took too long.
    #[error("{0}")]
    Timeout(String),
    /// The client did not read its stream.
    #[error("the client is too slow: more than {0} tokens waited to be read")]
    SlowClient(usize),
    /// Workers failed it, as often as it was allowed to be tried.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// A wrong field and what is wrong with it.
    pub(crate) fn invalid(param: &str, problem: impl std::fmt::Display) -> Self {
        Self::Invalid { message: format!("{param}: {problem}"), param: Some(param.to_string()) }
    }

    /// A field that would change the answer, and that is not served yet.
    pub(crate) fn unsupported(param: &str, what: impl std::fmt::Display) -> Self {
        Self::invalid(param, format_args!("{what} is not supported yet"))
    }
}
