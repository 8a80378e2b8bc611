//! Output that fits: schemas of rising difficulty against a model whose weights are random, so that nothing but the grammar
//! keeps it in shape.

use super::{load, small_config};
use crate::{
    Config, Engine, Model, Sampling, TokenId,
    scheduler::{Computed, Finish, History, Limits, Request, Scheduler, SequenceId, Stop, Until},
};
use grammar::{Grammar, Spec};
use serde_json::{Value, json};
use std::{collections::HashMap, sync::Arc, time::Duration};

const START: Duration = Duration::ZERO;
const PROMPT: [TokenId; 3] = [5, 6, 7];

/// Random numbers for a test (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// A schema that nests `depth` deep. What has no natural end is bounded: random weights end nothing by themselves.
    fn schema(&mut self, depth: usize) -> Value {
        match if depth == 0 { self.below(8) } else { 4 + self.below(10) } {
            0 => json!({"type": self.pick(&["boolean", "null"])}),
            1 => {
                let low = self.below(2000) as i64 - 1000;
                json!({"type": "integer", "minimum": low, "maximum": low + self.below(300) as i64})
            }
            2 => {
                let (low, step) = (self.below(40) as f64 / 4.0 - 5.0, self.pick(&[0.5, 2.25, 100.0]));
                let bound = self.pick(&["maximum", "exclusiveMaximum"]);
                json!({"type": "number", "exclusiveMinimum": low, bound: low + step})
            }
            3 => json!({"type": "integer", "multipleOf": self.pick(&[3, 7, 10]), "minimum": 0, "maximum": 500}),
            4 => {
                let least = self.below(3);
                json!({"type": "string", "minLength": least, "maxLength": least + self.below(6)})
            }
            5 => {
                let patterns =
                    ["^[a-f]{2,4}$", "^(north|south)-\\d{1,3}$", "^\\w+@\\w{1,5}$", "^[^\"x]{0,4}y?$", "^a|b$"];
                let pattern = self.pick(&patterns[..4]);
                json!({"type": "string", "pattern": pattern, "maxLength": 12})
            }
            6 if self.below(3) == 0 => {
                json!({"type": "string", "format": self.pick(&["email", "hostname", "ipv6", "duration", "uri"]), "maxLength": 30})
            }
            6 => json!({"type": "string", "format": self.pick(&["date", "uuid", "ipv4", "time", "date-time"])}),
            7 => {
                let all = [
                    json!("red"),
                    json!("grün \"x\"\n"),
                    json!(4),
                    json!(-2.5),
                    json!(null),
                    json!([1, "a"]),
                    json!({"k": true}),
                ];
                let from = self.below(5);
                if self.below(4) == 0 { json!({"const": all[from]}) } else { json!({"enum": all[from..from + 2]}) }
            }
            8 => {
                let least = self.below(3);
                json!({"type": "array", "items": self.schema(depth - 1), "minItems": least, "maxItems": least + 1})
            }
            9 => {
                json!({"type": "array", "prefixItems": [self.schema(depth - 1), self.schema(0)], "items": false, "minItems": 1})
            }
            10 => json!({"anyOf": [self.schema(depth - 1), self.schema(0), {"type": "null"}]}),
            11 => {
                let base = json!({"type": "object", "properties": {"id": self.schema(0)}, "required": ["id"]});
                let more = json!({"type": "object", "properties": {"more": self.schema(depth - 1)}, "required": ["more"], "maxProperties": 2});
                json!({"allOf": [base, more], "type": "object", "properties": {"id": true, "more": true}, "additionalProperties": false})
            }
            _ => self.object(depth),
        }
    }

    fn object(&mut self, depth: usize) -> Value {
        let names = ["name", "größe", "a b", "list", "x\"y", "deep"];
        let properties: serde_json::Map<String, Value> =
            (0..1 + self.below(4)).map(|index| (names[index].to_owned(), self.schema(depth - 1))).collect();
        let required: Vec<&String> = properties.keys().filter(|_| self.below(3) > 0).collect();
        json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
    }

    /// The `number`th of many, each harder than the ones before.
    fn numbered(&mut self, number: usize) -> Value {
        let depth = number / 125;
        match number % 25 {
            0 => {
                let node = json!({"type": "object", "properties": {"value": self.schema(0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                    "required": ["value", "next"], "additionalProperties": false});
                json!({"$defs": {"node": node}, "$ref": "#/$defs/node"})
            }
            1 => {
                let (one, two) = (self.schema(depth.min(2)), self.schema(0));
                json!({"definitions": {"one/1": one, "two": two}, "type": "array", "maxItems": 3,
                    "items": {"anyOf": [{"$ref": "#/definitions/one~11"}, {"$ref": "#/definitions/two"}]}})
            }
            2 => json!({"type": "object", "patternProperties": {"^n_[a-c]{1,3}$": self.schema(depth.min(2))},
                "additionalProperties": false, "minProperties": 1, "maxProperties": 3}),
            3 => json!({"oneOf": [
                {"type": "object", "properties": {"kind": {"const": "a"}, "a": self.schema(depth.min(2))}, "required": ["kind", "a"], "additionalProperties": false},
                {"type": "object", "properties": {"kind": {"const": "b"}, "b": self.schema(0)}, "required": ["kind", "b"], "additionalProperties": false}]}),
            _ => self.schema(depth),
        }
    }
}

/// A model, its engine and its scheduler.
struct World {
    model: Arc<Model>,
    engine: Engine,
    scheduler: Scheduler,
    /// What came of each sequence.
    ended: HashMap<SequenceId, (Vec<TokenId>, Finish)>,
    running: HashMap<SequenceId, Vec<TokenId>>,
}

impl World {
    fn new(name: &str) -> Self {
        let model = load(name);
        let config = Config { kv_bytes: Some(32 << 20), max_sequences: 64, ..small_config() };
        let engine = Engine::new(Arc::clone(&model), &config).expect("an engine");
        let layout = engine.memory().layout();
        let limits = Limits {
            pages: layout.pages as usize,
            page_tokens: layout.page_tokens as usize,
            token_budget: 512,
            max_sequences: 64,
            max_model_len: engine.max_model_len(),
            max_waiting: 1000,
        };
        let scheduler = Scheduler::new(limits).expect("a scheduler");
        Self { model, engine, scheduler, ended: HashMap::new(), running: HashMap::new() }
    }

    fn compile(&self, spec: &Spec) -> Arc<Grammar> {
        let grammars = self.model.grammars().expect("a tokenizer");
        grammars.compile_here(spec).unwrap_or_else(|error| panic!("{spec:?}: {error}"))
    }

    /// A request for output that fits `grammar`, of which `emitted` is there already.
    fn request(&self, grammar: &Arc<Grammar>, seed: u64, emitted: &[TokenId]) -> Request {
        let mut matcher = grammar.start(true);
        matcher.replay(emitted).expect("tokens that fit");
        Request {
            history: History::new(b"", [&PROMPT, emitted].concat(), 16),
            prompt_tokens: PROMPT.len(),
            adapter: None,
            sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
            grammar: Some(matcher),
            stop: Stop { max_tokens: 300, min_tokens: 0, ids: self.model.info().eos.clone() },
            prompt_logprobs: None,
            priority: 0,
            until: Until::End,
        }
    }

    fn submit(&mut self, request: Request) -> SequenceId {
        let emitted = request.history.tokens()[request.prompt_tokens..].to_vec();
        let id = self.scheduler.submit(request, START).expect("room in the line");
        self.running.insert(id, emitted);
        id
    }

    /// Steps until all have ended. `guess` may propose drafts for a sequence that has emitted its second argument.
    fn run(&mut self, guess: &mut dyn FnMut(SequenceId, &[TokenId]) -> Vec<TokenId>) {
        while !self.running.is_empty() {
            let decoding: Vec<SequenceId> = self.scheduler.decoding().map(|decoding| decoding.id).collect();
            for id in decoding {
                let drafts = guess(id, &self.running[&id]);
                self.scheduler.guess(id, &drafts);
            }
            let plan = self.scheduler.schedule(START);
            let Self { engine, scheduler, .. } = self;
            let Computed { drawn, faults, .. } = scheduler.compute(plan, engine, &mut |_, _| {}, &|| START);
            assert!(faults.is_empty(), "{faults:?}");
            for drawn in drawn {
                let emitted = self.running.get_mut(&drawn.id).expect("a live sequence");
                assert_eq!(emitted.len(), drawn.index);
                emitted.push(drawn.sampled.token);
                if let Some((finish, _)) = drawn.ended {
                    let emitted = self.running.remove(&drawn.id).expect("a live sequence");
                    self.ended.insert(drawn.id, (emitted, finish));
                }
            }
        }
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        let bytes = self.model.grammars().expect("a tokenizer").table().text(tokens);
        String::from_utf8(bytes).expect("a grammar of characters gives UTF-8")
    }
}

/// Runs schemas `numbers` on `model`; returns how many outputs came to their end.
fn check_schemas(model: &str, numbers: std::ops::Range<usize>, whitespace: Option<&str>) -> usize {
    let mut world = World::new(model);
    let mut asked = Vec::new();
    for number in numbers {
        let schema = Random(number as u64).numbered(number);
        let spec = Spec { whitespace: whitespace.map(str::to_owned), ..Spec::json_schema(&schema) };
        let request = world.request(&world.compile(&spec), number as u64, &[]);
        asked.push((world.submit(request), number, schema));
    }
    world.run(&mut |_, _| Vec::new());
    let mut finished = 0;
    for (id, number, schema) in &asked {
        let (tokens, finish) = &world.ended[id];
        if *finish == Finish::Length {
            continue;
        }
        finished += 1;
        let text = world.text(tokens);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{number}: {error}: {text}"));
        let validator = jsonschema::options().should_validate_formats(true).build(schema).expect("a good schema");
        if let Err(error) = validator.validate(&value) {
            panic!("{number}: {error}\n{text}\n{schema}");
        }
    }
    finished
}

#[test]
fn five_hundred_schemas_hold() {
    // Half with the blanks a client gets by default, half without, on both kinds of vocabulary.
    let finished = check_schemas("tests/golden/qwen2", 0..250, None)
        + check_schemas("tests/golden/llama", 250..400, Some(""))
        + check_schemas("tests/golden/llama3", 400..500, Some(""));
    assert!(finished >= 450, "{finished} of 500 came to an end");
}

#[test]
fn drafts_and_replay_change_nothing() {
    let mut world = World::new("tests/golden/qwen2");
    let specs: Vec<Spec> =
        (0..500).step_by(29).map(|number| Spec::json_schema(&Random(number as u64).numbered(number))).collect();
    let specs: Vec<Spec> = specs
        .into_iter()
        .chain([Spec::regex("[a-z]{3,9}(-[0-9]+){1,3}!"), Spec::choice(&["yes", "no", "perhaps"])])
        .collect();
    let grammars: Vec<Arc<Grammar>> = specs.iter().map(|spec| world.compile(spec)).collect();
    let submit_all = |world: &mut World, emitted: &dyn Fn(usize) -> Vec<TokenId>| -> Vec<SequenceId> {
        let submit = |(index, grammar)| {
            let request = world.request(grammar, index as u64, &emitted(index));
            world.submit(request)
        };
        grammars.iter().enumerate().map(submit).collect()
    };
    let ids = submit_all(&mut world, &|_| Vec::new());
    world.run(&mut |_, _| Vec::new());
    let expected: Vec<(Vec<TokenId>, Finish)> = ids.iter().map(|id| world.ended[id].clone()).collect();

    // Guesses that are right for a while and then wrong, or outside the grammar.
    let mut steps = 0;
    let ids = submit_all(&mut world, &|_| Vec::new());
    let known: HashMap<SequenceId, Vec<TokenId>> =
        ids.iter().zip(&expected).map(|(id, (tokens, _))| (*id, tokens.clone())).collect();
    world.run(&mut |id, emitted| {
        steps += 1;
        let right = (emitted.len() * 7 + steps) % 5;
        let mut drafts: Vec<TokenId> = known[&id][emitted.len()..].iter().copied().take(right).collect();
        drafts.extend([3, 90]);
        drafts
    });
    let total: usize = expected.iter().map(|(tokens, _)| tokens.len()).sum();
    assert!(steps * 4 < total * 3, "{steps} steps of single sequences for {total} tokens: drafts came through");
    ids.iter().zip(&expected).for_each(|(id, expected)| assert_eq!(&world.ended[id], expected));

    // Another worker goes on from anywhere.
    for share in [1, 2, 3] {
        let cut = |index: usize| expected[index].0[..(expected[index].0.len() - 1) * share / 4].to_vec();
        let ids = submit_all(&mut world, &cut);
        world.run(&mut |_, _| Vec::new());
        ids.iter().zip(&expected).for_each(|(id, expected)| assert_eq!(&world.ended[id], expected));
    }
}
