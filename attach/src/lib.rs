//! What both kinds of worker are: a life ([`live`]), a step thread ([`start_thread`]), and an end of their router streams.
//!
//! Both serve the same gRPC service: submissions and cancels come down one stream per router, and after each step
//! one frame goes up with that router's tokens, the page events and the load. This crate owns that conversation; wire
//! types stop here. What to do with a submission is the worker's.
//!
//! ```text
//!  router ──► [rpc] one task per stream ── Command ──► the worker's step thread
//!         ◄── [outbox] polled by gRPC  ◄── flush ───── [Routers], once per step
//! ```
//!
//! The step thread never waits for a router: what it hands over is added to the stream's [`outbox`] under a short lock, and
//! gRPC takes from there whatever has gathered since the last frame. A router that reads too slowly loses its stream.
#![forbid(unsafe_code)]

mod adapters;
mod address;
mod cards;
#[cfg(any(fuzzing, test))]
pub mod fuzz;
mod inbox;
mod kept;
mod legs;
mod life;
mod load;
mod meters;
mod outbox;
mod prefixes;
mod routers;
mod rpc;
mod submission;
mod thread;

pub use address::advertised;
pub use inbox::{Inbox, Input};
pub use legs::{Duplicate, Legs};
pub use life::{Parts, Slot, live};
pub use load::Load;
pub use meters::Meters;
pub use outbox::Router;
pub use prefixes::Prefixes;
pub use routers::{End, Routers};
pub use rpc::{Profile, serve};
pub use submission::{Borrowing, Keep, Leg, Submission};
pub use thread::{Stepper, start_thread};

/// Names a router's stream within this worker's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// Names one leg of one attempt at a request: attempts are unique within a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LegId {
    /// Who asked.
    pub stream: StreamId,
    /// Which attempt.
    pub attempt: u64,
}

impl std::fmt::Display for LegId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.stream.0, self.attempt)
    }
}

/// What routers ask of a worker. The channel that carries these is bounded: while it is full, the stream's task waits, and with it
/// the router's sending side.
#[derive(Debug)]
pub enum Command {
    /// A router is there; hand this to [`Routers::attach`].
    Attached(Router),
    /// Something to compute. It must end in [`Routers::ended`], unless its stream ends first.
    Submit(Box<Submission>),
    /// Not wanted any more. Unknown legs have ended already.
    Cancel(LegId),
    /// The router lost count of the page events.
    Resync(StreamId),
    /// Wants all prefixes forgotten; the answer, to [`Routers::reset`], carries this number.
    Reset(StreamId, u64),
    /// The router is gone, and with it all it submitted.
    Detached(StreamId),
}
