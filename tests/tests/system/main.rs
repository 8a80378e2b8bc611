//! The whole system, as its users meet it. One binary, so that it links once.
#![forbid(unsafe_code)]

mod adapters;
mod bad_input;
mod cancel;
mod etcd;
mod failover;
mod gguf;
mod golden;
mod grammars;
mod one_request;
mod openai_client;
mod prompt_logprobs;
mod speculation;
mod up;
