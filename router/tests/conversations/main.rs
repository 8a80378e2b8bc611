//! Whole conversations: a real HTTP client, the real router, workers that do as the test tells them.

mod answers;
mod inputs;
mod life;
mod mock;
mod support;
mod workers;
