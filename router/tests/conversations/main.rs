//! Whole conversations: a real HTTP client, the real router, workers that do as the test tells them.

mod answers;
mod door;
mod embeddings;
mod foreign;
mod inputs;
mod life;
mod mock;
mod rows;
mod support;
mod tools;
mod transfer;
mod turns;
mod two_routers;
mod workers;
