//! A worker's end of its router streams.
//!
//! Both worker crates serve the same gRPC service: submissions and cancels come down one stream per router, and after each step
//! one frame goes up with that router's tokens, the page events and the load. This crate owns that conversation; wire
//! types stop here. What to do with a submission is the worker's.
#![forbid(unsafe_code)]
