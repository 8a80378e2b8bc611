//! The decode worker.
#![forbid(unsafe_code)]
