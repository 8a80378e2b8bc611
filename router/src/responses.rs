//! `/v1/responses`: OpenAI's newer API, served by the pipeline of chat completions.
//!
//! A request is rewritten as the chat request that means the same ([`request`]) and goes its way from there; what is generated
//! becomes output items ([`answer`]). Unless it says `store: false`, the response and the conversation up to it stay for a while in
//! the memory of this router ([`store`]), to be read, gone on from, or, where it runs in the background, to be cancelled.

pub(crate) mod answer;
pub(crate) mod object;
pub(crate) mod request;
pub(crate) mod store;
