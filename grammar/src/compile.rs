//! Texts become grammars: bounded, once, and away from the threads that compute.

use crate::{
    Error, Kind, Mask, Matcher, Spec, TokenId, TokenTable, ebnf, guarded, matcher::allows_any, schema, thoughts,
};
use llguidance::{
    JsonCompileOptions, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{InferenceCapabilities, TokEnv, TokTrie, TokenizerEnv},
};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde_json::Value;
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// What compiling may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest schema and list of choices, in bytes.
    pub text_bytes: usize,
    /// Longest Lark grammar, in bytes. Its terminals may add up to one expression.
    pub lark_bytes: usize,
    /// Longest from the request until its grammar is there, waiting included. What one text can cost is bounded by the parser's own
    /// limits as well, so that a thread is never lost to one.
    pub patience: Duration,
    /// Grammars that are kept.
    pub kept: usize,
    /// Texts that may wait to be compiled.
    pub waiting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { text_bytes: 256 << 10, lark_bytes: 16 << 10, patience: Duration::from_secs(5), kept: 128, waiting: 256 }
    }
}

/// A compiled grammar over one model's tokens. Shared by all sequences that follow it.
pub struct Grammar {
    /// As compiled: nothing was ever computed on it, so what starts from a copy depends on its own tokens alone.
    pristine: llguidance::Matcher,
    first: Mask,
    eos: Vec<TokenId>,
    helpers: Arc<ThreadPool>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// Returns a place at the beginning of the grammar. `may_end` says whether the model's end-of-sequence tokens are allowed where
    /// the grammar accepts; without them a sequence goes on as long as the grammar does.
    pub fn start(self: &Arc<Self>, may_end: bool) -> Matcher {
        Matcher::new(Arc::clone(self), self.pristine.deep_clone(), may_end)
    }

    /// Tokens allowed at the beginning, end-of-sequence among them where the grammar accepts nothing at all.
    pub(crate) fn first(&self) -> &Mask {
        &self.first
    }

    pub(crate) fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    pub(crate) fn helpers(&self) -> &ThreadPool {
        &self.helpers
    }
}

/// Compiles the grammars of one model.
pub struct Grammars {
    limits: Limits,
    shared: Arc<Shared>,
    compilers: ThreadPool,
}

/// What the compiling threads share.
struct Shared {
    factory: ParserFactory,
    table: Arc<TokenTable>,
    limits: Limits,
    cache: Mutex<Cache>,
    helpers: Arc<ThreadPool>,
    waiting: AtomicUsize,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("limits", &self.limits).field("table", &self.shared.table).finish()
    }
}

/// The tokens as `llguidance` sees them. Text is never tokenised here: forced bytes may come in any tokens that spell them.
struct Tokens(Arc<TokenTable>);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        self.0.trie()
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.trie().greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// Threads that compile. Two, so that one large grammar does not hold up all small ones.
const COMPILERS: usize = 2;
/// Stack of a compiling thread: schemas and expressions are walked recursively, some levels take kilobytes.
const COMPILER_STACK_BYTES: usize = 64 << 20;

impl Grammars {
    /// Starts the threads and prepares `table`, which takes a moment for a large vocabulary. `helpers` threads compute masks.
    ///
    /// # Errors
    /// [`Error::Tokens`] when the vocabulary or the machine do not allow it.
    pub fn new(table: Arc<TokenTable>, limits: Limits, helpers: usize) -> Result<Self, Error> {
        let environment: TokEnv = Arc::new(Tokens(Arc::clone(&table)));
        let factory = guarded(|| {
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
                .map_err(|error| format!("{error:#}"))?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        });
        let threads = |name: &'static str, count: usize, stack: usize| {
            let builder = ThreadPoolBuilder::new().num_threads(count).stack_size(stack);
            builder
                .thread_name(move |index| format!("{name}-{index}"))
                .build()
                .map_err(|e| Error::Tokens(e.to_string()))
        };
        let shared = Shared {
            factory: factory.map_err(Error::Tokens)?,
            table,
            limits,
            cache: Mutex::new(Cache { kept: limits.kept, ..Cache::default() }),
            helpers: Arc::new(threads("grammar-mask", helpers.max(1), 8 << 20)?),
            waiting: AtomicUsize::new(0),
        };
        let compilers = threads("grammar-compile", COMPILERS, COMPILER_STACK_BYTES)?;
        Ok(Self { limits, shared: Arc::new(shared), compilers })
    }

    /// Returns the tokens it compiles for.
    pub fn table(&self) -> &Arc<TokenTable> {
        &self.shared.table
    }

    /// Returns how long a caller should wait for an answer before it gives up with [`Grammars::too_slow`].
    pub fn patience(&self) -> Duration {
        self.limits.patience
    }

    /// What is said of a grammar that is not there in time.
    pub fn too_slow(&self) -> Error {
        Error::Invalid(format!("it is not compiled after {:?}: make it smaller", self.limits.patience))
    }

    /// Hands `spec` to a compiling thread, or looks it up there, and `done` the result: also on that thread.
    pub fn compile(&self, spec: Spec, done: impl FnOnce(Result<Arc<Grammar>, Error>) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        let waiting = shared.waiting.fetch_add(1, Ordering::Relaxed);
        if waiting >= self.limits.waiting {
            shared.waiting.fetch_sub(1, Ordering::Relaxed);
            return done(Err(Error::Busy(waiting)));
        }
        let (asked, patience, too_slow) = (Instant::now(), self.limits.patience, self.too_slow());
        self.compilers.spawn(move || {
            shared.waiting.fetch_sub(1, Ordering::Relaxed);
            // Nobody waits any more for what stood in line for too long.
            let result = if asked.elapsed() > patience { Err(too_slow) } else { shared.look_up_or_compile(&spec) };
            done(result);
        });
    }

    /// As [`Grammars::compile`], then goes on by `tokens`, which were emitted before.
    pub fn resume(
        &self,
        spec: Spec,
        tokens: Vec<TokenId>,
        may_end: bool,
        done: impl FnOnce(Result<Matcher, Error>) + Send + 'static,
    ) {
        self.compile(spec, move |grammar| {
            let resumed = grammar.and_then(|grammar| {
                let mut matcher = grammar.start(may_end);
                matcher.replay(&tokens)?;
                Ok(matcher)
            });
            done(resumed);
        });
    }

    /// Compiles on this thread, however long it takes. For tests and tools.
    pub fn compile_here(&self, spec: &Spec) -> Result<Arc<Grammar>, Error> {
        // A deep schema needs the compilers' stack.
        self.compilers.install(|| self.shared.look_up_or_compile(spec))
    }
}

impl Shared {
    fn look_up_or_compile(&self, spec: &Spec) -> Result<Arc<Grammar>, Error> {
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(spec) {
            return known;
        }
        let result = guarded(|| self.compile(spec)).map(Arc::new).map_err(Error::Invalid);
        lock().insert(spec.clone(), result.clone());
        result
    }

    fn compile(&self, spec: &Spec) -> Result<Grammar, String> {
        let most = match spec.kind {
            Kind::JsonSchema | Kind::Choice => self.limits.text_bytes,
            Kind::Regex => schema::MAX_PATTERN_BYTES,
            Kind::Lark => self.limits.lark_bytes,
        };
        if spec.text.len() > most {
            return Err(format!("{} bytes are more than the {most} allowed", spec.text.len()));
        }
        let grammar = match spec.kind {
            Kind::JsonSchema => TopLevelGrammar::from_json_schema(json_schema(spec)?),
            Kind::Regex => TopLevelGrammar::from_regex(&spec.text),
            Kind::Lark => TopLevelGrammar::from_lark(spec.text.clone()),
            Kind::Choice => TopLevelGrammar::from_lark(choice(&spec.text)?),
        };
        let grammar = match &spec.thoughts {
            Some(thoughts) => thoughts::before(grammar, thoughts, &self.table)?,
            None => grammar,
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| format!("{error:#}"))?;
        let mut pristine = llguidance::Matcher::new(Ok(parser));
        let warnings = pristine.grammar_warnings();
        if spec.kind == Kind::JsonSchema && !warnings.is_empty() {
            return Err(warnings.join("; "));
        }
        // A grammar that allows nothing is found out here. The copy keeps the caches of the original empty.
        let first =
            pristine.deep_clone().compute_mask_or_eos().map_err(|error| format!("nothing fits it: {error:#}"))?;
        let first = Mask::new(first.as_slice(), self.table.vocab_size());
        if !allows_any(first.words()) {
            return Err("nothing fits it".into());
        }
        let eos = self.table.eos().to_vec();
        Ok(Grammar { pristine, first, eos, helpers: Arc::clone(&self.helpers) })
    }
}

/// Reads a schema and adds our settings to it, the way `llguidance` takes them.
fn json_schema(spec: &Spec) -> Result<Value, String> {
    let mut schema: Value = serde_json::from_str(&spec.text).map_err(|error| format!("not valid JSON: {error}"))?;
    schema::prepare(&mut schema)?;
    let whitespace = spec.whitespace.as_deref().unwrap_or(Spec::DEFAULT_WHITESPACE);
    let options = JsonCompileOptions {
        whitespace_flexible: !whitespace.is_empty(),
        whitespace_pattern: (!whitespace.is_empty()).then(|| whitespace.to_owned()),
        ..JsonCompileOptions::default()
    };
    match schema {
        Value::Bool(false) => return Err("nothing fits the schema false".into()),
        Value::Bool(true) => schema = Value::Object(serde_json::Map::new()),
        _ => {}
    }
    options.apply_to(&mut schema);
    Ok(schema)
}

/// Writes a list of choices as Lark.
fn choice(list: &str) -> Result<String, String> {
    let choices: Vec<String> = serde_json::from_str(list).map_err(|error| format!("not a list of strings: {error}"))?;
    if choices.is_empty() {
        return Err("there is no choice in an empty list".into());
    }
    let quoted: Vec<String> = choices.iter().map(|choice| ebnf::quote(choice)).collect();
    Ok(format!("start: {}", quoted.join(" | ")))
}

/// The grammars that were asked for last, and the texts that make none.
#[derive(Default)]
struct Cache {
    kept: usize,
    known: HashMap<Spec, Result<Arc<Grammar>, Error>>,
    /// Oldest first.
    order: VecDeque<Spec>,
}

impl Cache {
    fn get(&mut self, spec: &Spec) -> Option<Result<Arc<Grammar>, Error>> {
        let known = self.known.get(spec).cloned()?;
        if let Some(at) = self.order.iter().position(|other| other == spec) {
            let spec = self.order.remove(at).expect("it was found just above");
            self.order.push_back(spec);
        }
        Some(known)
    }

    fn insert(&mut self, spec: Spec, grammar: Result<Arc<Grammar>, Error>) {
        if self.known.insert(spec.clone(), grammar).is_none() {
            self.order.push_back(spec);
        }
        while self.order.len() > self.kept {
            let oldest = self.order.pop_front().expect("it is not empty");
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests;
