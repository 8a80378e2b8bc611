//! What computes in the simulation: by hand, row by row, or a card that begins steps.

use super::{PAGE, Random, digest, draw, hidden_state};
use crate::{Error, Logprobs, Pooling, Row, Sample, Sampled, Step, Yield};
use kv_cache::{PageId, TokenId};
use std::collections::VecDeque;

/// What each position of each page holds.
pub(super) struct Memory(pub(super) Vec<[u64; PAGE]>);

impl Memory {
    pub(super) fn check_written(&self, pages: &[PageId], tokens: &[TokenId], until: usize) {
        for position in 0..until {
            let found = self.0[pages[position / PAGE].index()][position % PAGE];
            assert_eq!(found, digest(&tokens[..=position]), "position {position} of {tokens:?} in {pages:?}");
        }
    }

    pub(super) fn write(&mut self, pages: &[PageId], tokens: &[TokenId], range: std::ops::Range<usize>) {
        for position in range {
            self.0[pages[position / PAGE].index()][position % PAGE] = digest(&tokens[..=position]);
        }
    }
}

/// A row of a step, fixed when the step is: what the engine reads, and what it makes of it.
pub(super) struct Work {
    pub(super) pages: Vec<PageId>,
    /// With drafts.
    pub(super) known: Vec<TokenId>,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) made: Yield,
}

impl Work {
    pub(super) fn of(row: &Row<'_>, known: &[TokenId]) -> Self {
        assert_eq!(row.tokens, &known[row.start..row.start + row.tokens.len()]);
        let mut made = Yield::default();
        if let Some(wanted) = row.prompt_logprobs {
            assert_eq!(wanted.targets, &known[row.start + 1..][..wanted.targets.len()]);
            let logprobs = |_| Logprobs { logprob: 0.0, rank: 1, top: Vec::new() };
            made.prompt_logprobs = wanted.targets.iter().map(logprobs).collect();
        }
        let end = row.start + row.tokens.len();
        let pooled = match row.pooling {
            Some(Pooling::Last) => end - 1..end,
            Some(Pooling::Mean) => row.start..end,
            None => 0..0,
        };
        made.hidden.extend(pooled.flat_map(|position| hidden_state(&known[..=position])));
        if let Some(sample) = row.sample {
            assert_eq!(sample.history, &known[..end]);
            for position in end - row.drafts..=end {
                let token = draw(&known[..position], forbidden_at(position, &sample));
                made.sampled.push(Sampled { token, logprobs: None });
                if known[..end].get(position) != Some(&token) {
                    break;
                }
            }
        }
        Self { pages: row.pages.to_vec(), known: known.to_vec(), start: row.start, end, made }
    }

    pub(super) fn carry_out(self, memory: &mut Memory) -> Yield {
        memory.check_written(&self.pages, &self.known, self.start);
        memory.write(&self.pages, &self.known, self.start..self.end);
        self.made
    }
}

fn forbidden_at<'a>(position: usize, sample: &Sample<'a>) -> &'a [TokenId] {
    if position - sample.prompt_tokens < sample.min_tokens { sample.forbidden } else { &[] }
}

/// A row that was begun.
struct Late {
    pages: Vec<PageId>,
    /// The last of them may be one that the row `follows` draws.
    known: Vec<TokenId>,
    follows: Option<usize>,
    forbidden: Vec<TokenId>,
    undecided: bool,
}

/// An engine that begins steps.
pub(super) struct Card {
    pub(super) memory: Memory,
    random: Random,
    /// What is known of each sequence of the plan at hand, drafts included.
    pub(super) known: Vec<Vec<TokenId>>,
    begun: VecDeque<Vec<Late>>,
    /// What the step that ended last drew, where it could tell.
    drawn: Vec<Option<TokenId>>,
    made: Vec<Yield>,
    /// Rows that followed a token.
    pub(super) followed: usize,
    pub(super) undecided: usize,
}

impl Card {
    /// With so many pages; what it cannot do comes from `seed`.
    pub(super) fn new(pages: usize, seed: u64) -> Self {
        Self {
            memory: Memory(vec![[0; PAGE]; pages]),
            random: Random(seed ^ 1),
            known: Vec::new(),
            begun: VecDeque::new(),
            drawn: Vec::new(),
            made: Vec::new(),
            followed: 0,
            undecided: 0,
        }
    }
}

impl Step for Card {
    fn step(&mut self, rows: &[Row<'_>], _: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        assert!(self.begun.is_empty(), "steps end in their order");
        let work: Vec<Work> = rows.iter().zip(&self.known).map(|(row, known)| Work::of(row, known)).collect();
        self.made = work.into_iter().map(|work| work.carry_out(&mut self.memory)).collect();
        Ok(&mut self.made)
    }

    fn begin(&mut self, rows: &[Row<'_>]) -> Result<bool, Error> {
        let decodes = |row: &Row<'_>| {
            row.tokens.len() == 1 && row.sample.is_some() && row.prompt_logprobs.is_none() && !row.leaves
        };
        if !rows.iter().all(decodes) || self.random.one_in(8) {
            return Ok(false);
        }
        let late = |(row, known): (&Row<'_>, &Vec<TokenId>)| {
            let (sample, end) = (row.sample.expect("it decodes"), row.start + 1);
            assert_eq!(sample.history, &known[..end]);
            let (forbidden, undecided) = (forbidden_at(end, &sample).to_vec(), self.random.one_in(12));
            let (pages, known, follows) = (row.pages.to_vec(), known[..end].to_vec(), row.follows);
            Late { pages, known, follows, forbidden, undecided }
        };
        self.begun.push_back(rows.iter().zip(&self.known).map(late).collect());
        assert!(self.begun.len() <= 2, "one step ahead");
        Ok(true)
    }

    fn end(&mut self) -> Result<&mut [Yield], Error> {
        let rows = self.begun.pop_front().expect("a step was begun");
        let before = std::mem::take(&mut self.drawn);
        for Late { pages, mut known, follows, forbidden, undecided } in rows {
            let (last, followed) = (known.len() - 1, follows.map(|row| before[row]));
            self.followed += usize::from(follows.is_some());
            let token = match followed {
                // What follows nothing is computed all the same, and written where its sequence has a page.
                Some(None) => {
                    self.memory.0[pages[last / PAGE].index()][last % PAGE] = 1;
                    None
                }
                token => {
                    known[last] = token.flatten().unwrap_or(known[last]);
                    self.memory.check_written(&pages, &known, last);
                    self.memory.write(&pages, &known, last..last + 1);
                    (!undecided).then(|| draw(&known, &forbidden))
                }
            };
            self.undecided += usize::from(token.is_none());
            self.drawn.push(token);
        }
        let made =
            |token: &Option<TokenId>| token.map_or(Yield::default(), |token| Sampled { token, logprobs: None }.into());
        self.made = self.drawn.iter().map(made).collect();
        Ok(&mut self.made)
    }
}
