//! An imagined worker: a real scheduler over a real page pool, whose steps take what its pace says.

use crate::link::Link;
use engine::{
    Sampled, Sampling, TokenId, Yield,
    scheduler::{Computed, History, Limits, Plan, Request, Scheduler, SequenceId, Stop, Until},
};
use kv_cache::CacheDelta;
use placement::Report;
use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};
use timing::{Fit, Pace};

/// Number of a request of the trace.
pub(crate) type RequestId = usize;

/// See the module.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) scheduler: Scheduler,
    pub(crate) link: Link,
    /// Which request a sequence is.
    pub(crate) requests: HashMap<SequenceId, RequestId>,
    /// Requests whose pages are on their way here or wait for room, in order.
    pub(crate) waiting: VecDeque<(SequenceId, RequestId)>,
    /// Legs that have not ended.
    pub(crate) legs: u32,
    /// Number of the last submission that has come.
    pub(crate) received: u64,
    step: Option<Plan>,
    pace: Pace,
    fit: Fit,
    yields: Vec<Yield>,
}

impl Worker {
    pub(crate) fn new(limits: Limits, pace: Pace, link: Link) -> Self {
        Self {
            scheduler: Scheduler::new(limits).expect("limits were checked"),
            link,
            requests: HashMap::new(),
            waiting: VecDeque::new(),
            legs: 0,
            received: 0,
            step: None,
            pace,
            fit: Fit::default(),
            yields: Vec::new(),
        }
    }

    /// Whether nothing runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// Begins a step, unless one runs or there is nothing to do. Returns how long it takes, and the sequences that are in a step for the
    /// first time.
    pub(crate) fn begin_step(&mut self, now: Duration) -> Option<(Duration, Vec<SequenceId>)> {
        if self.step.is_some() {
            return None;
        }
        let mut plan = self.scheduler.schedule(now);
        // What a first plan only took from others, the next one gives out.
        while plan.is_empty() && !plan.preempted().is_empty() {
            plan = self.scheduler.schedule(now);
        }
        if plan.is_empty() {
            return None;
        }
        let took = self.pace.step(&plan.work());
        let started = plan.started().to_vec();
        self.step = Some(plan);
        Some((took, started))
    }

    /// Ends the step that took `took`.
    pub(crate) fn end_step(&mut self, now: Duration, took: Duration) -> Computed {
        let plan = self.step.take().expect("a step runs");
        self.fit.add(&plan.work(), took);
        self.yields.clear();
        self.yields.extend(plan.chunks().iter().map(|chunk| {
            // Nobody reads it: what is said is not what the trace's next prompt holds, which is not known.
            let token = TokenId::MAX - (chunk.start + chunk.tokens) as TokenId;
            let sampled = if chunk.sample { vec![Sampled { token, logprobs: None }] } else { Vec::new() };
            Yield { sampled, ..Yield::default() }
        }));
        self.scheduler.complete(plan, &mut self.yields, now)
    }

    /// Returns what it tells routers.
    pub(crate) fn report(&self) -> Report {
        let pages = self.scheduler.pool().stats();
        let work = self.scheduler.backlog().prompts;
        let pace = self.fit.pace();
        Report {
            received: self.received,
            sequences: self.legs,
            backlog_ms: pace.map_or(0.0, |pace| pace.prompt_ms(work.tokens, work.pairs)),
            free_pages: pages.available() as u32,
            total_pages: pages.total as u32,
            draining: false,
            pace,
            link_bytes_per_s: None,
        }
    }

    pub(crate) fn take_delta(&mut self) -> CacheDelta {
        self.scheduler.take_delta()
    }
}

/// Returns a request for `output` tokens after `history`.
pub(crate) fn request(history: History, output: usize, until: Until) -> Request {
    Request {
        prompt_tokens: history.len(),
        history,
        adapter: None,
        sampling: Sampling::default(),
        grammar: None,
        stop: Stop { max_tokens: output, ..Stop::default() },
        prompt_logprobs: None,
        priority: 0,
        until,
    }
}
