//! Responses that can be asked for again, in the memory of this router.
//!
//! The store is bounded by count and bytes; full, it forgets the oldest, and calls it off if it still runs, since nobody could ask
//! for it any more. Another router knows nothing of what is here, and a restart forgets all of it.

use crate::{config::Limits, error::Error};
use bytes::Bytes;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// See the module.
#[derive(Debug)]
pub(crate) struct Store {
    max_responses: usize,
    max_bytes: usize,
    inner: Mutex<Inner>,
    /// Responses that run in the background.
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<String, Entry>,
    /// Ids by age.
    order: BTreeMap<u64, String>,
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// The response object as JSON.
    object: Bytes,
    /// The messages up to and with the answer, as a JSON list.
    conversation: Bytes,
    background: bool,
    /// Calls it off, while it runs.
    running: Option<CancellationToken>,
}

impl Entry {
    fn bytes(&self, id: &str) -> usize {
        2 * id.len() + self.object.len() + self.conversation.len()
    }
}

impl Store {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            max_responses: limits.stored_responses,
            max_bytes: limits.stored_response_bytes,
            inner: Mutex::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// Keeps a response that is complete, in one way or another.
    pub(crate) fn keep(&self, id: &str, object: &Value, conversation: &[Value]) {
        self.insert(id, object, conversation, false, None);
    }

    /// Keeps a response that runs in the background. The token is cancelled when it is not wanted any more.
    pub(crate) fn begin(&self, id: &str, object: &Value) -> CancellationToken {
        let running = CancellationToken::new();
        self.insert(id, object, &[], true, Some(running.clone()));
        running
    }

    /// Puts the result of a response that ran in the background in its place, unless it is not wanted any more.
    pub(crate) fn finish(&self, id: &str, object: &Value, conversation: &[Value]) {
        let wanted = self.lock().entries.get(id).is_some_and(|entry| entry.running.is_some());
        if wanted {
            self.insert(id, object, conversation, true, None);
        }
    }

    fn insert(
        &self,
        id: &str,
        object: &Value,
        conversation: &[Value],
        background: bool,
        running: Option<CancellationToken>,
    ) {
        let (object, conversation) = (Bytes::from(object.to_string()), json_list(conversation));
        let mut inner = self.lock();
        inner.remove(id);
        inner.next += 1;
        let entry = Entry { number: inner.next, object, conversation, background, running };
        inner.bytes += entry.bytes(id);
        inner.order.insert(entry.number, id.to_string());
        inner.entries.insert(id.to_string(), entry);
        while inner.entries.len() > self.max_responses || inner.bytes > self.max_bytes {
            let Some((_, oldest)) = inner.order.pop_first() else { break };
            if let Some(running) = inner.remove(&oldest).and_then(|entry| entry.running) {
                running.cancel();
            }
        }
    }

    /// Returns a response object as JSON.
    pub(crate) fn get(&self, id: &str) -> Result<Bytes, Error> {
        Ok(self.lock().entries.get(id).ok_or_else(|| unknown(id))?.object.clone())
    }

    /// Returns the messages up to and with the answer of a response.
    pub(crate) fn conversation(&self, id: &str) -> Result<Vec<Value>, Error> {
        let name = "previous_response_id";
        let conversation = match self.lock().entries.get(id) {
            None => return Err(Error::invalid(name, unknown(id))),
            Some(entry) if entry.running.is_some() => {
                return Err(Error::invalid(name, format_args!("response {id:?} is still in progress")));
            }
            Some(entry) => entry.conversation.clone(),
        };
        Ok(serde_json::from_slice(&conversation).expect("what was written here reads back"))
    }

    /// Forgets a response, and calls it off if it runs.
    pub(crate) fn delete(&self, id: &str) -> Result<(), Error> {
        let entry = self.lock().remove(id).ok_or_else(|| unknown(id))?;
        entry.running.inspect(CancellationToken::cancel);
        Ok(())
    }

    /// Calls off a response that runs in the background; one that has ended stays as it is. Returns the object.
    pub(crate) fn cancel(&self, id: &str) -> Result<Bytes, Error> {
        let (object, running) = {
            let inner = self.lock();
            let entry = inner.entries.get(id).ok_or_else(|| unknown(id))?;
            if !entry.background {
                let message = format!("response {id:?} does not run in the background and cannot be cancelled");
                return Err(Error::Invalid { message, param: None });
            }
            let Some(running) = &entry.running else { return Ok(entry.object.clone()) };
            (entry.object.clone(), running.clone())
        };
        running.cancel();
        let mut object: Value = serde_json::from_slice(&object).expect("what was written here reads back");
        object["status"] = "cancelled".into();
        self.finish(id, &object, &[]);
        self.get(id)
    }

    /// Runs the work of a response in the background.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    /// Waits until nothing runs in the background. Nothing may be spawned afterwards.
    pub(crate) async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics while it holds the store")
    }
}

impl Inner {
    fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        self.order.remove(&entry.number);
        self.bytes -= entry.bytes(id);
        Some(entry)
    }
}

fn json_list(values: &[Value]) -> Bytes {
    serde_json::to_vec(values).expect("values are JSON").into()
}

fn unknown(id: &str) -> Error {
    Error::NotFound(format!("response {id:?} is not here: it was not stored, was deleted, or is long ago"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn store(stored_responses: usize, stored_response_bytes: usize) -> Store {
        Store::new(&Limits { stored_responses, stored_response_bytes, ..Limits::default() })
    }

    #[test]
    fn the_oldest_is_forgotten_beyond_either_bound() {
        let store = store(2, 1_000);
        for id in ["a", "b", "c"] {
            store.keep(id, &json!({"id": id}), &[]);
        }
        assert!(matches!(store.get("a"), Err(Error::NotFound(_))));
        assert_eq!(store.get("c").unwrap(), r#"{"id":"c"}"#);
        store.keep("d", &json!({"text": "x".repeat(980)}), &[]);
        assert!(store.get("b").is_err() && store.get("c").is_err() && store.get("d").is_ok());
        store.keep("e", &json!({"text": "x".repeat(2_000)}), &[]);
        assert!(store.get("d").is_err() && store.get("e").is_err(), "one that is too large is not kept");
        assert_eq!(store.lock().bytes, 0);
    }

    #[test]
    fn what_runs_is_cancelled_once_and_its_result_is_dropped() {
        let store = store(8, 1 << 20);
        let running = store.begin("r", &json!({"status": "in_progress"}));
        assert!(store.conversation("r").unwrap_err().to_string().contains("in progress"));
        assert_eq!(store.cancel("r").unwrap(), r#"{"status":"cancelled"}"#);
        assert!(running.is_cancelled());
        store.finish("r", &json!({"status": "completed"}), &[]);
        assert_eq!(store.get("r").unwrap(), r#"{"status":"cancelled"}"#);
        assert_eq!(store.cancel("r").unwrap(), r#"{"status":"cancelled"}"#);

        let done = store.begin("d", &json!({"status": "in_progress"}));
        store.finish("d", &json!({"status": "completed"}), &[json!({"role": "user"})]);
        assert_eq!(store.cancel("d").unwrap(), r#"{"status":"completed"}"#, "what has ended stays as it is");
        assert!(!done.is_cancelled());
        assert_eq!(store.conversation("d").unwrap(), [json!({"role": "user"})]);

        store.keep("k", &json!({}), &[]);
        assert!(matches!(store.cancel("k"), Err(Error::Invalid { .. })), "it did not run in the background");
        let gone = store.begin("g", &json!({}));
        store.delete("g").unwrap();
        assert!(gone.is_cancelled() && store.delete("g").is_err());
    }
}
