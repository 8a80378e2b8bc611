//! One sequence's place in its grammar.
//!
//! A step needs to know which tokens may come next when it draws, and that takes longer to find out than drawing: it is begun
//! ([`Matcher::prepare`]) when the step is, on helper threads, and picked up ([`Matcher::masks`]) when the logits are there. Speculation
//! guesses several tokens: the masks of one step are those before each guess and after the last.

use crate::{Error, TokenId, compile::Grammar, guarded};
use std::{
    fmt, mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

/// One bit per token of the vocabulary: whether it may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask(Vec<u32>);

impl Mask {
    /// Takes the leading `vocab_size` bits of `words`.
    pub(crate) fn new(words: &[u32], vocab_size: usize) -> Self {
        let mut bits = vec![0; vocab_size.div_ceil(32)];
        let shared = bits.len().min(words.len());
        bits[..shared].copy_from_slice(&words[..shared]);
        if !vocab_size.is_multiple_of(32) {
            *bits.last_mut().expect("a vocabulary is not empty") &= (1 << (vocab_size % 32)) - 1;
        }
        Self(bits)
    }

    /// Makes a mask of a vocabulary of `vocab_size` tokens that allows `tokens`. For tests: real ones come from a [`Matcher`].
    pub fn of(vocab_size: usize, tokens: &[TokenId]) -> Self {
        let mut bits = vec![0; vocab_size.div_ceil(32)];
        tokens.iter().for_each(|token| bits[*token as usize / 32] |= 1 << (token % 32));
        Self(bits)
    }

    /// Returns the bits, `[vocab / 32]` rounded up, the lowest token in the lowest bit.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// Says whether `token` may come next.
    pub fn allows(&self, token: TokenId) -> bool {
        self.0.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    fn forbid(&mut self, token: TokenId) {
        if let Some(word) = self.0.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }
}

pub(crate) fn allows_any(words: &[u32]) -> bool {
    words.iter().any(|word| *word != 0)
}

/// The masks of one step: before each token guessed, and after the last. Fewer where a guess is not allowed or ends the sequence, because
/// nothing is drawn behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masks(Vec<Mask>);

impl Masks {
    /// Returns what may come after `position` of the guesses; `None` behind a guess that the grammar does not allow, or that is the last
    /// token of the sequence.
    pub fn at(&self, position: usize) -> Option<&Mask> {
        self.0.get(position)
    }
}

/// See the module. Cloning takes everything along and shares nothing that changes.
pub struct Matcher {
    grammar: Arc<Grammar>,
    may_end: bool,
    desk: Arc<Desk>,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher")
            .field("grammar", &self.grammar)
            .field("may_end", &self.may_end)
            .finish_non_exhaustive()
    }
}

impl Clone for Matcher {
    fn clone(&self) -> Self {
        let state = match &*self.desk.idle() {
            State::Idle(place) | State::Ready(place, _) => State::Idle(place.copy()),
            State::Lost(error) => State::Lost(error.clone()),
            State::Working => unreachable!("idle waits for the end of the work"),
        };
        Self { grammar: Arc::clone(&self.grammar), may_end: self.may_end, desk: Arc::new(Desk::new(state)) }
    }
}

/// Where the parser lies, for whoever works on it.
struct Desk {
    state: Mutex<State>,
    /// Rings when work is done.
    done: Condvar,
}

enum State {
    /// Nobody works on it.
    Idle(Place),
    /// A helper has it.
    Working,
    /// The masks of the coming step.
    Ready(Place, Arc<Masks>),
    /// There is no way on.
    Lost(Error),
}

/// A parser after some tokens.
struct Place {
    parser: llguidance::Matcher,
    /// Tokens it has taken.
    taken: usize,
    /// Whether the grammar is at its end: it accepts, and nothing can follow.
    complete: bool,
}

impl Matcher {
    pub(crate) fn new(grammar: Arc<Grammar>, parser: llguidance::Matcher, may_end: bool) -> Self {
        // A grammar may be at its end before the first token.
        let complete = parser.is_stopped();
        let place = Place { parser, taken: 0, complete };
        Self { grammar, may_end, desk: Arc::new(Desk::new(State::Idle(place))) }
    }

    /// Begins to compute the masks of a step that guesses `drafts`, on a helper thread. Without this, [`Matcher::masks`] does it.
    pub fn prepare(&self, drafts: &[TokenId]) {
        let mut state = self.desk.idle();
        let place = match mem::replace(&mut *state, State::Working) {
            State::Idle(place) | State::Ready(place, _) => place,
            lost => return *state = lost,
        };
        drop(state);
        let (grammar, desk) = (Arc::clone(&self.grammar), Arc::clone(&self.desk));
        let (drafts, may_end) = (drafts.to_vec(), self.may_end);
        self.grammar.helpers().spawn(move || desk.put(place.work(&grammar, may_end, &drafts)));
    }

    /// Returns the masks of the coming step: those prepared, or without guesses when none were.
    ///
    /// # Errors
    /// [`Error::Lost`] when there is no way on.
    pub fn masks(&self) -> Result<Arc<Masks>, Error> {
        let mut state = self.desk.idle();
        if let State::Idle(_) = &*state {
            let State::Idle(place) = mem::replace(&mut *state, State::Working) else { unreachable!("seen just above") };
            *state = place.work(&self.grammar, self.may_end, &[]);
        }
        match &*state {
            State::Ready(_, masks) => Ok(Arc::clone(masks)),
            State::Lost(error) => Err(error.clone()),
            State::Idle(_) | State::Working => unreachable!("the work was done just above"),
        }
    }

    /// Returns how many of `drafts` the grammar allows, from the first on.
    pub fn allowed(&self, drafts: &[TokenId]) -> usize {
        match &mut *self.desk.idle() {
            State::Idle(place) | State::Ready(place, _) => place.parser.validate_tokens(drafts).unwrap_or(0),
            _ => 0,
        }
    }

    /// Goes on by `token`, which was drawn: cheap, compared to a mask.
    ///
    /// # Errors
    /// [`Error::Lost`] when the grammar does not allow it. That is remembered: there is no way on then.
    pub fn advance(&mut self, token: TokenId) -> Result<(), Error> {
        let mut state = self.desk.idle();
        let mut place = match mem::replace(&mut *state, State::Working) {
            State::Idle(place) | State::Ready(place, _) => place,
            State::Lost(error) => {
                *state = State::Lost(error.clone());
                return Err(error);
            }
            State::Working => unreachable!("idle waits for the end of the work"),
        };
        match guarded(|| place.take(token)) {
            Ok(()) => {
                *state = State::Idle(place);
                Ok(())
            }
            Err(problem) => {
                let error =
                    Error::Lost(format!("token {token} at {} does not fit the grammar: {problem}", place.taken));
                *state = State::Lost(error.clone());
                Err(error)
            }
        }
    }

    /// Goes on by all of `tokens`.
    ///
    /// # Errors
    /// As [`Matcher::advance`].
    pub fn replay(&mut self, tokens: &[TokenId]) -> Result<(), Error> {
        tokens.iter().try_for_each(|token| self.advance(*token))
    }

    /// Says whether the grammar accepts what has come, and nothing can follow.
    pub fn is_complete(&self) -> bool {
        matches!(&*self.desk.idle(), State::Idle(place) | State::Ready(place, _) if place.complete)
    }
}

impl Desk {
    fn new(state: State) -> Self {
        Self { state: Mutex::new(state), done: Condvar::new() }
    }

    /// Waits until nobody works on it.
    fn idle(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let working = |state: &mut State| matches!(state, State::Working);
        self.done.wait_while(state, working).unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.done.notify_all();
    }
}

impl Place {
    /// Returns a copy with caches of its own: what other sequences do must not change what is found too complex here.
    fn copy(&self) -> Self {
        Self { parser: self.parser.deep_clone(), taken: self.taken, complete: self.complete }
    }

    fn take(&mut self, token: TokenId) -> Result<(), String> {
        if self.complete {
            return Err("it was complete".into());
        }
        self.parser.consume_token(token).map_err(|error| format!("{error:#}"))?;
        self.taken += 1;
        self.complete = self.parser.is_stopped();
        Ok(())
    }

    /// Computes the masks of a step that guesses `drafts`, and comes back to where it was.
    fn work(mut self, grammar: &Grammar, may_end: bool, drafts: &[TokenId]) -> State {
        let result = guarded(|| {
            let masks = self.walk(grammar, may_end, drafts)?;
            Ok((self, masks))
        });
        match result {
            Ok((place, masks)) => State::Ready(place, Arc::new(masks)),
            Err(problem) => State::Lost(Error::Lost(format!("the grammar has no way on: {problem}"))),
        }
    }

    fn walk(&mut self, grammar: &Grammar, may_end: bool, drafts: &[TokenId]) -> Result<Masks, String> {
        let (taken, complete) = (self.taken, self.complete);
        let mut masks = vec![self.mask(grammar, may_end)?];
        for &draft in drafts {
            let allowed = masks.last().is_some_and(|mask| mask.allows(draft));
            if !allowed || grammar.eos().contains(&draft) {
                break;
            }
            self.take(draft)?;
            if self.complete {
                break;
            }
            masks.push(self.mask(grammar, may_end)?);
        }
        if self.taken > taken {
            self.parser.rollback(self.taken - taken).map_err(|error| format!("{error:#}"))?;
            (self.taken, self.complete) = (taken, complete);
        }
        Ok(Masks(masks))
    }

    fn mask(&mut self, grammar: &Grammar, may_end: bool) -> Result<Mask, String> {
        let mut mask = if self.taken == 0 {
            grammar.first().clone()
        } else {
            let set = self.parser.compute_mask_or_eos().map_err(|error| format!("{error:#}"))?;
            Mask::new(set.as_slice(), grammar.first().words().len() * 32)
        };
        if !may_end {
            grammar.eos().iter().for_each(|token| mask.forbid(*token));
        }
        Ok(mask)
    }
}
