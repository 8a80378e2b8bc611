//! A router by hand: one stream to a worker, and what has come up it.

use crate::workers::PATIENCE;
use cluster::Member;
use proto::{Ended, Load, RouterFrame, Submit, WorkerFrame, ended::Reason, submit::Leg, worker_client::WorkerClient};
use std::collections::HashMap;
use tokio::{sync::mpsc, time::timeout};
use tonic::Streaming;

/// What one leg has said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Tokens by index.
    pub(crate) tokens: Vec<(u32, u32)>,
    pub(crate) ended: Option<Ended>,
}

impl Said {
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.ended.as_ref().map(Ended::reason)
    }

    pub(crate) fn message(&self) -> &str {
        self.ended.as_ref().map_or("", |ended| &ended.message)
    }
}

/// One stream to one worker.
#[derive(Debug)]
pub(crate) struct Router {
    to: mpsc::Sender<RouterFrame>,
    from: Streaming<WorkerFrame>,
    pub(crate) legs: HashMap<u64, Said>,
    pub(crate) load: Load,
    /// Hashes this worker can reuse.
    pub(crate) cached: std::collections::HashSet<[u8; 16]>,
    /// Why the stream ended, once it has.
    pub(crate) closed: Option<String>,
}

impl Router {
    pub(crate) async fn attach(member: &Member) -> Self {
        let (to, frames) = mpsc::channel(64);
        let hello = proto::Hello { protocol: proto::PROTOCOL, router: "test".into() };
        to.send(RouterFrame { hello: Some(hello), ..Default::default() }).await.expect("there is room");
        let mut client = WorkerClient::connect(format!("http://{}", member.address)).await.expect("the worker listens");
        let frames = futures::stream::unfold(frames, async |mut frames| Some((frames.recv().await?, frames)));
        let from = client.attach(frames).await.expect("the worker attaches").into_inner();
        let (legs, load, cached) = Default::default();
        let mut router = Self { to, from, legs, load, cached, closed: None };
        router.until("the greeting", |router| router.load.pages_total > 0).await;
        router
    }

    pub(crate) async fn submit(&mut self, submit: Submit) {
        self.legs.insert(submit.attempt, Said::default());
        self.send(RouterFrame { submit: vec![submit], ..Default::default() }).await;
    }

    pub(crate) async fn cancel(&mut self, attempt: u64) {
        self.cancel_all([attempt]).await;
    }

    pub(crate) async fn cancel_all(&mut self, attempts: impl IntoIterator<Item = u64>) {
        self.send(RouterFrame { cancel: attempts.into_iter().collect(), ..Default::default() }).await;
    }

    async fn send(&mut self, frame: RouterFrame) {
        self.to.send(frame).await.expect("the stream is open");
    }

    /// Reads until `done`.
    pub(crate) async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let reading = async {
            while !done(self) {
                match self.from.message().await {
                    Ok(Some(frame)) => self.take(frame),
                    Ok(None) => self.closed = Some("ended".into()),
                    Err(status) => self.closed = Some(status.to_string()),
                }
                assert!(self.closed.is_none() || done(self), "{what}: the stream closed: {:?}", self.closed);
            }
        };
        let waited = timeout(PATIENCE, reading).await;
        assert!(waited.is_ok(), "{what} did not come; load {:?}, legs {:?}", self.load, self.legs);
    }

    /// Reads until a leg has ended.
    pub(crate) async fn ended(&mut self, attempt: u64) -> Said {
        self.until("the end of a leg", |router| router.legs[&attempt].ended.is_some()).await;
        self.legs[&attempt].clone()
    }

    /// Reads until a leg has said so many tokens.
    pub(crate) async fn tokens(&mut self, attempt: u64, count: usize) {
        self.until("tokens", |router| router.legs[&attempt].tokens.len() >= count).await;
    }

    /// Reads until nobody holds a page of this worker.
    pub(crate) async fn all_pages_back(&mut self) {
        self.until("all pages", |router| {
            let load = &router.load;
            load.pages_free == load.pages_total && load.running == 0 && load.waiting == 0 && load.handoffs == 0
        })
        .await;
    }

    fn take(&mut self, frame: WorkerFrame) {
        for token in frame.tokens {
            let said = self.legs.get_mut(&token.attempt).expect("tokens are of legs that were submitted");
            assert!(said.ended.is_none(), "a token after the end of {}", token.attempt);
            said.tokens.push((token.index, token.token));
        }
        for ended in frame.ended {
            let said = self.legs.get_mut(&ended.attempt).expect("ends are of legs that were submitted");
            assert!(said.ended.replace(ended).is_none(), "a leg ended twice");
        }
        if let Some(load) = frame.load {
            self.load = load;
        }
        if let Some(pages) = frame.pages {
            if pages.snapshot {
                self.cached.clear();
            }
            for hash in hashes(&pages.evicted) {
                assert!(self.cached.remove(&hash), "evicted, but never stored");
            }
            self.cached.extend(hashes(&pages.stored));
        }
    }
}

fn hashes(bytes: &[u8]) -> impl Iterator<Item = [u8; 16]> {
    bytes.chunks_exact(16).map(|hash| hash.try_into().expect("a chunk has 16 bytes"))
}

/// A greedy request for `count` tokens after `prompt`, end-of-sequence ignored, for whichever leg.
pub(crate) fn request(attempt: u64, prompt: &[u32], count: usize, leg: Leg) -> Submit {
    Submit {
        attempt,
        request: format!("req-{attempt}"),
        tokens: proto::pack(&[prompt]),
        prompt_tokens: prompt.len() as u32,
        sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, seed: 7, ..Default::default() }),
        stop: Some(proto::Stop { max_tokens: count as u32, ignore_eos: true, ..Default::default() }),
        leg: Some(leg),
        ..Default::default()
    }
}

pub(crate) fn local() -> Leg {
    Leg::Local(proto::Local {})
}

pub(crate) fn to_decode(handoff: u64, decode: &Member) -> Leg {
    Leg::Prefill(proto::PrefillLeg {
        handoff,
        worker: decode.id.clone(),
        incarnation: decode.incarnation,
        link: decode.link.clone(),
    })
}

pub(crate) fn from_prefill(handoff: u64, prefill: &Member) -> Leg {
    Leg::Decode(proto::DecodeLeg { handoff, worker: prefill.id.clone(), incarnation: prefill.incarnation })
}

/// The tokens with the indices they must have, counted from `first`.
pub(crate) fn numbered(tokens: &[u32], first: usize) -> Vec<(u32, u32)> {
    tokens.iter().enumerate().skip(first).map(|(index, &token)| (index as u32, token)).collect()
}
