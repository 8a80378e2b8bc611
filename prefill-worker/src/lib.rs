//! The prefill worker.
#![forbid(unsafe_code)]
