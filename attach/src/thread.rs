//! The thread that steps, and what becomes of it.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};
use tokio::sync::oneshot;

/// What runs on a step thread.
pub trait Stepper: Send + 'static {
    /// Works until there is nothing left to do and nothing will come. An error says why it cannot go on.
    fn run(&mut self) -> Result<(), String>;

    /// `run` has panicked or cannot go on: tells whoever waits for it. What it knows may be half-done.
    fn fail(&mut self, problem: &str);
}

/// Starts a thread that runs `stepper`. The receiver learns how it ended, and why if that was before its time.
pub fn start_thread(name: &str, mut stepper: impl Stepper) -> io::Result<oneshot::Receiver<Result<(), String>>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name(name.into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| stepper.run()))
            .unwrap_or_else(|panic| Err(format!("it panicked: {}", message(panic.as_ref()))));
        if let Err(problem) = &outcome {
            tracing::error!(problem, "the step thread ended");
            stepper.fail(problem);
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

    type End = fn() -> Result<(), String>;

    struct Fake {
        end: End,
        told: Arc<Mutex<Vec<String>>>,
    }

    impl Stepper for Fake {
        fn run(&mut self) -> Result<(), String> {
            (self.end)()
        }

        fn fail(&mut self, problem: &str) {
            self.told.lock().unwrap().push(problem.into());
        }
    }

    #[tokio::test]
    async fn an_early_end_is_told_to_both_sides() {
        let ends: [(End, Option<&str>); 3] = [
            (|| Ok(()), None),
            (|| Err("the card is gone".into()), Some("the card is gone")),
            (|| panic!("page {} is lost", 7), Some("it panicked: page 7 is lost")),
        ];
        for (end, problem) in ends {
            let told = Arc::default();
            let ended = start_thread("fake", Fake { end, told: Arc::clone(&told) }).unwrap().await.unwrap();
            assert_eq!(ended.err().as_deref(), problem);
            assert_eq!(*told.lock().unwrap(), Vec::from_iter(problem));
        }
    }
}
