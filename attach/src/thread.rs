//! The thread that steps, and what becomes of it.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};
use tokio::sync::oneshot;

/// What runs on a step thread.
pub trait Stepper: Send + 'static {
    /// Works until there is nothing left to do and nothing will come.
    fn run(&mut self);

    /// `run` has panicked: tells whoever waits for it. What it knows may be half-done.
    fn fail(&mut self, panic: &str);
}

/// Starts a thread that runs `stepper`. The receiver learns how it ended: with the message of its panic, if it was one.
pub fn start_thread(name: &str, mut stepper: impl Stepper) -> io::Result<oneshot::Receiver<Result<(), String>>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name(name.into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| stepper.run())).map_err(|panic| message(panic.as_ref()));
        if let Err(panic) = &outcome {
            tracing::error!(panic, "the step thread panicked");
            stepper.fail(panic);
        }
        // Nobody listens when the worker was dropped.
        let _ = sender.send(outcome);
    })?;
    Ok(receiver)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    struct Fake {
        panics: bool,
        told: Arc<Mutex<Vec<String>>>,
    }

    impl Stepper for Fake {
        fn run(&mut self) {
            assert!(!self.panics, "page {} is lost", 7);
        }

        fn fail(&mut self, panic: &str) {
            self.told.lock().unwrap().push(panic.into());
        }
    }

    #[tokio::test]
    async fn a_panic_is_told_to_both_sides() {
        for panics in [false, true] {
            let told = Arc::default();
            let ended = start_thread("fake", Fake { panics, told: Arc::clone(&told) }).unwrap().await.unwrap();
            assert_eq!(ended, if panics { Err("page 7 is lost".into()) } else { Ok(()) });
            assert_eq!(*told.lock().unwrap(), if panics { vec!["page 7 is lost"] } else { vec![] });
        }
    }
}
