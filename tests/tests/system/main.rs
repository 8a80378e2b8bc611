//! The whole system, as its users meet it. One binary, so that it links once.
#![forbid(unsafe_code)]

mod adapters;
mod bad_input;
mod bench;
mod cancel;
mod cards;
mod clients;
mod embeddings;
mod etcd;
mod failover;
mod fuzz_openapi;
mod gguf;
mod golden;
mod grammars;
mod messages;
mod one_request;
mod prompt_logprobs;
mod proxy;
mod reset;
mod responses;
mod speculation;
mod tokens;
mod up;
mod vllm_metrics;
