//! What is let in, and when. Pure: no clock, no I/O, no randomness of its own.
//!
//! Whoever admits keeps a [`Queue`] of those who wait, tells it now and then what the workers can take ([`supply`]), and holds what placement
//! predicts ([`Forecast`]) against what requests want. The router does so with live workers, the simulation with imagined ones.
#![forbid(unsafe_code)]

mod forecast;
mod queue;
mod supply;

pub use forecast::{Forecast, TRY_EVERY};
pub use queue::{AGED_TURN, Ask, Limits, Objective, Outcome, Queue, Refusal, Supply, Ticket, Waits};
pub use supply::{Working, supply};
