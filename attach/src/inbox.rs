//! What a step thread reacts to.

use crate::Command;
use std::{io, time::Instant};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_util::sync::CancellationToken;

/// Most that is handed out between two steps, so that a flood of it does not stop the steps.
const PER_STEP: usize = 1024;

/// One thing to react to. `E` is what the worker's links report.
#[derive(Debug)]
pub enum Input<E> {
    /// A router asks.
    Command(Command),
    /// A link reports.
    Event(E),
}

/// Where a step thread gets its work from, and learns that it should end.
#[derive(Debug)]
pub struct Inbox<E> {
    commands: mpsc::Receiver<Command>,
    events: mpsc::Receiver<E>,
    drain: CancellationToken,
    stop: CancellationToken,
    /// What the last [`Inbox::take`] saw of `drain`. Between two of them the answer does not change, so that a drain asked for
    /// after the thread has looked wakes it from the wait that follows.
    draining: bool,
    /// For the timers of an idle wait; its own, because the thread may outlive the runtime it was started from.
    runtime: Runtime,
}

impl<E> Inbox<E> {
    /// Joins the two channels. `drain` asks the thread to take nothing new, `stop` to end at once.
    pub fn new(
        commands: mpsc::Receiver<Command>,
        events: mpsc::Receiver<E>,
        drain: CancellationToken,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        Ok(Self { commands, events, drain, stop, draining: false, runtime })
    }

    /// Says whether nothing new is to be taken.
    pub fn draining(&self) -> bool {
        self.draining
    }

    /// Says whether the thread is to end at once.
    pub fn stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Takes what has come, without waiting. News of links go first: they free pages for what routers ask.
    pub fn take(&mut self) -> Vec<Input<E>> {
        self.draining = self.drain.is_cancelled();
        let events = std::iter::from_fn(|| self.events.try_recv().ok()).map(Input::Event).take(PER_STEP);
        let mut inputs: Vec<Input<E>> = events.collect();
        let commands = std::iter::from_fn(|| self.commands.try_recv().ok()).map(Input::Command);
        inputs.extend(commands.take(PER_STEP));
        inputs
    }

    /// Waits until something comes, `until` has passed, or the thread is asked to drain or stop.
    pub fn wait(&mut self, until: Option<Instant>) -> Option<Input<E>> {
        let Self { commands, events, drain, stop, draining, runtime } = self;
        let timer = async {
            match until {
                Some(moment) => tokio::time::sleep_until(moment.into()).await,
                None => std::future::pending().await,
            }
        };
        // Cancel safety: both `recv` leave what they do not return in their channel.
        runtime.block_on(async {
            tokio::select! {
                Some(event) = events.recv() => Some(Input::Event(event)),
                Some(command) = commands.recv() => Some(Input::Command(command)),
                () = timer => None,
                () = drain.cancelled(), if !*draining => None,
                () = stop.cancelled() => None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StreamId;
    use std::time::Duration;

    fn inbox(drain: &CancellationToken) -> (Inbox<u8>, mpsc::Sender<Command>, mpsc::Sender<u8>) {
        let ((commands, commands_receiver), (events, events_receiver)) = (mpsc::channel(4), mpsc::channel(4));
        let inbox = Inbox::new(commands_receiver, events_receiver, drain.clone(), CancellationToken::new());
        (inbox.expect("timers start"), commands, events)
    }

    #[test]
    fn a_drain_asked_for_between_the_look_and_the_wait_wakes_it() {
        let drain = CancellationToken::new();
        let (mut inbox, _commands, _events) = inbox(&drain);
        assert!(inbox.take().is_empty() && !inbox.draining());
        drain.cancel();
        assert!(!inbox.draining(), "not until the next look");
        assert!(inbox.wait(None).is_none());
        assert!(inbox.take().is_empty() && inbox.draining());
    }

    #[test]
    fn a_draining_thread_waits_for_what_comes_or_for_its_deadline() {
        let drain = CancellationToken::new();
        drain.cancel();
        let (mut inbox, commands, events) = inbox(&drain);
        inbox.take();
        assert!(inbox.wait(Some(Instant::now() + Duration::from_millis(5))).is_none());
        events.try_send(7).expect("there is room");
        assert!(matches!(inbox.wait(None), Some(Input::Event(7))));
        commands.try_send(Command::Detached(StreamId(1))).expect("there is room");
        events.try_send(8).expect("there is room");
        let taken = inbox.take();
        assert!(matches!(taken[..], [Input::Event(8), Input::Command(Command::Detached(_))]), "{taken:?}");
    }
}
