//! Prompts whose pages are kept for a while after their end, for peers that were told of them and may fetch them.
//!
//! What is kept cannot be evicted, so nothing is kept for ever: a prompt is let go when a peer has fetched it, when its time is up, or
//! when others need the room, for half of the pool at most is kept. Whoever asks later finds what the prefix cache still has.

use crate::Keep;
use engine::scheduler::{Hold, Scheduler, SequenceId};
use kv_cache::PageHash;
use metrics::{counter, describe_counter};
use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

/// The kept prompts of one worker.
#[derive(Debug)]
pub(crate) struct Kept {
    worker: String,
    /// Sequences that are not over, and what is to be kept of them.
    coming: HashMap<SequenceId, Keep>,
    /// In the order in which they came.
    prompts: VecDeque<Prompt>,
}

#[derive(Debug)]
struct Prompt {
    /// Names the last page, and with it all before.
    last: PageHash,
    hold: Hold,
    until: Instant,
}

impl Kept {
    /// Starts with none.
    pub(crate) fn new(worker: &str) -> Self {
        describe_counter!("baton_kept_prompts_total", "Prompts kept for peers, by what became of them");
        Self { worker: worker.to_owned(), coming: HashMap::new(), prompts: VecDeque::new() }
    }

    /// Notes what is to be kept when the sequence is over.
    pub(crate) fn announce(&mut self, sequence: SequenceId, keep: Keep) {
        self.coming.insert(sequence, keep);
    }

    /// The sequence came to nothing.
    pub(crate) fn forget(&mut self, sequence: SequenceId) {
        self.coming.remove(&sequence);
    }

    /// The sequence is over, and its pages are in the prefix cache.
    pub(crate) fn keep(&mut self, now: Instant, sequence: SequenceId, scheduler: &mut Scheduler) {
        let Some(Keep { pages, time }) = self.coming.remove(&sequence) else { return };
        let Some(&last) = pages.last() else { return };
        let hold = scheduler.lend(&pages);
        self.prompts.push_back(Prompt { last, hold, until: now + time });
        let most = scheduler.pool().stats().total / 2;
        while self.pages() > most {
            self.let_go(0, "displaced", scheduler);
        }
    }

    /// A peer has fetched the prompt up to this page.
    pub(crate) fn fetched(&mut self, last: PageHash, scheduler: &mut Scheduler) {
        if let Some(at) = self.prompts.iter().position(|prompt| prompt.last == last) {
            self.let_go(at, "fetched", scheduler);
        }
    }

    /// Lets go of those whose time is up.
    pub(crate) fn expire(&mut self, now: Instant, scheduler: &mut Scheduler) {
        while let Some(at) = self.prompts.iter().position(|prompt| prompt.until <= now) {
            self.let_go(at, "expired", scheduler);
        }
    }

    /// Returns when the next one's time is up.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.prompts.iter().map(|prompt| prompt.until).min()
    }

    /// Counts pages; those that prompts share count for each.
    fn pages(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.hold.pages().len()).sum()
    }

    fn let_go(&mut self, at: usize, outcome: &'static str, scheduler: &mut Scheduler) {
        let Some(prompt) = self.prompts.remove(at) else { return };
        counter!("baton_kept_prompts_total", "worker" => self.worker.clone(), "outcome" => outcome).increment(1);
        scheduler.give_back(prompt.hold);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::scheduler::{History, Limits, Request, Stop, Until};
    use std::time::Duration;

    const LEASE: Duration = Duration::from_secs(30);

    fn scheduler() -> Scheduler {
        let limits =
            Limits { pages: 8, page_tokens: 4, token_budget: 64, max_sequences: 4, max_model_len: 32, max_waiting: 8 };
        Scheduler::new(limits).expect("the limits make sense")
    }

    /// Puts two pages into the prefix cache, as a prompt of eight tokens `token` leaves them there. Returns their names.
    fn computed(scheduler: &mut Scheduler, token: u32) -> (SequenceId, Vec<PageHash>) {
        let history = History::new(b"", vec![token; 9], 4);
        let names = history.hashes()[..2].to_vec();
        let prefix = scheduler.reserve_prefix(&names).expect("there is room");
        scheduler.keep_prefix(prefix, &names);
        let request = Request {
            history,
            prompt_tokens: 9,
            adapter: None,
            sampling: Default::default(),
            stop: Stop { max_tokens: 1, min_tokens: 0, ids: Vec::new() },
            grammar: None,
            prompt_logprobs: None,
            priority: 0,
            until: Until::End,
        };
        let sequence = scheduler.submit(request, Duration::ZERO).expect("there is room in the line");
        scheduler.cancel(sequence, Duration::ZERO);
        (sequence, names)
    }

    fn keep(names: &[PageHash]) -> Keep {
        Keep { pages: names.to_vec(), time: LEASE }
    }

    fn held(scheduler: &Scheduler) -> usize {
        scheduler.pool().stats().held()
    }

    #[test]
    fn a_prompt_is_kept_until_it_is_fetched_or_its_time_is_up() {
        let (mut scheduler, mut kept, now) = (scheduler(), Kept::new("w"), Instant::now());
        let (first, names) = computed(&mut scheduler, 1);
        kept.announce(first, keep(&names));
        assert_eq!((held(&scheduler), kept.next_deadline()), (0, None), "its sequence is not over");
        kept.keep(now, first, &mut scheduler);
        assert_eq!((held(&scheduler), kept.next_deadline()), (2, Some(now + LEASE)));
        kept.fetched(PageHash(1), &mut scheduler);
        assert_eq!(held(&scheduler), 2, "another one was fetched");
        kept.fetched(names[1], &mut scheduler);
        assert_eq!((held(&scheduler), kept.next_deadline()), (0, None));

        let (second, names) = computed(&mut scheduler, 2);
        kept.announce(second, keep(&names));
        kept.keep(now, second, &mut scheduler);
        kept.expire(now + LEASE - Duration::from_millis(1), &mut scheduler);
        assert_eq!(held(&scheduler), 2);
        kept.expire(now + LEASE, &mut scheduler);
        assert_eq!(held(&scheduler), 0);
        assert_eq!(scheduler.pool().matching(&names), 2, "the prefix cache has it still");
    }

    #[test]
    fn half_of_the_pool_at_most_is_kept() {
        let (mut scheduler, mut kept, now) = (scheduler(), Kept::new("w"), Instant::now());
        let mut prompts = Vec::new();
        for token in 1..=3 {
            let (sequence, names) = computed(&mut scheduler, token);
            kept.announce(sequence, keep(&names));
            kept.keep(now, sequence, &mut scheduler);
            prompts.push(names);
        }
        assert_eq!(held(&scheduler), 4, "the first one made room");
        kept.fetched(prompts[0][1], &mut scheduler);
        assert_eq!(held(&scheduler), 4);
        kept.fetched(prompts[1][1], &mut scheduler);
        kept.fetched(prompts[2][1], &mut scheduler);
        assert_eq!(held(&scheduler), 0);
    }

    #[test]
    fn what_came_to_nothing_is_not_kept() {
        let (mut scheduler, mut kept) = (scheduler(), Kept::new("w"));
        let (sequence, names) = computed(&mut scheduler, 1);
        kept.announce(sequence, keep(&names));
        kept.forget(sequence);
        kept.keep(Instant::now(), sequence, &mut scheduler);
        assert_eq!(held(&scheduler), 0);
    }
}
