//! The whole system, as its users meet it. One binary, so that it links once.
#![forbid(unsafe_code)]

mod bad_input;
mod cancel;
mod etcd;
mod failover;
mod golden;
mod one_request;
mod openai_client;
mod up;
