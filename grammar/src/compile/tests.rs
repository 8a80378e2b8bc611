use super::*;
use crate::Thoughts;
use serde_json::json;
use std::sync::mpsc;

/// Every byte is a token, some words are too, and 0 ends a sequence.
fn bytes() -> Arc<TokenTable> {
    let single = (0..=255u8).map(|byte| (u32::from(byte) + 1, vec![byte], false));
    let words =
        ["{\"", "\":", "true", "false", "null", "yes", "no", "ye", "[[", "}}", "  ", "<tool>", "<think>", "</think>"];
    let words =
        (300..).zip(words).map(|(id, word)| (id, word.as_bytes().to_vec(), matches!(word, "<tool>" | "</think>")));
    let end = std::iter::once((0, b"</s>".to_vec(), true));
    Arc::new(TokenTable::from_parts(333, &[0], end.chain(single).chain(words)).unwrap())
}

fn grammars() -> Grammars {
    Grammars::new(bytes(), Limits::default(), 2).unwrap()
}

fn tokens(text: &str) -> Vec<TokenId> {
    text.bytes().map(|byte| u32::from(byte) + 1).collect()
}

/// Whether `text` fits, and is whole: end-of-sequence may follow, or nothing.
fn fits(grammar: &Arc<Grammar>, text: &str) -> bool {
    let mut matcher = grammar.start(true);
    for token in tokens(text) {
        if matcher.is_complete() || !matcher.masks().unwrap().at(0).unwrap().allows(token) {
            return false;
        }
        matcher.advance(token).unwrap();
    }
    matcher.is_complete() || matcher.masks().unwrap().at(0).unwrap().allows(0)
}

fn check(spec: &Spec, good: &[&str], bad: &[&str]) {
    let grammar = grammars().compile_here(spec).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
    good.iter().for_each(|text| assert!(fits(&grammar, text), "{text:?} fits {spec:?}"));
    bad.iter().for_each(|text| assert!(!fits(&grammar, text), "{text:?} does not fit {spec:?}"));
}

fn refused(spec: &Spec, words: &[&str]) {
    let error = grammars().compile_here(spec).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    words.iter().for_each(|word| assert!(error.to_string().contains(word), "{error} lacks {word:?}"));
    assert!(error.to_string().chars().count() <= 401, "{error}");
}

#[test]
fn schemas() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12},
        "b": {"enum": ["x", null]}}, "required": ["a"], "additionalProperties": false});
    let spec = Spec::json_schema(&schema);
    check(
        &spec,
        &[r#"{"a":3}"#, r#"{ "a" : 12, "b":"x" }"#, "{\n\"a\":7,\"b\":null}"],
        &["{}", r#"{"a":2}"#, r#"{"a":13}"#, r#"{"a":3,"c":1}"#, r#"{"a":3"#, " {\"a\":3}"],
    );
    let tight = Spec { whitespace: Some(String::new()), ..spec };
    check(&tight, &[r#"{"a":3}"#], &[r#"{"a": 3}"#]);
    check(&Spec::json_object(), &["{}", r#"{"x":[1,{"y":"z"}]}"#], &["[]", "1", "{\"x\"}"]);
    let anchored = json!({"$defs": {"n/m": {"$anchor": "here", "type": "null"}}, "type": "array", "prefixItems": [{"$ref": "#here"}, {"$ref": "#/$defs/n~1m"}], "items": false});
    check(&Spec::json_schema(&anchored), &["[]", "[null,null]"], &["[1]", "[null,null,null]"]);
    let between = |low: f64, high: f64| {
        Spec::json_schema(&json!({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}))
    };
    check(&between(2.0, 2.5), &["2.1", "2.01", "2.49"], &["2", "2.0", "2.5", "2.50", "1.9"]);
    check(&between(-0.5, 0.0), &["-0.1", "-0.49"], &["0", "-0", "-0.0", "-0.5"]);
    check(&between(-3.0, 7.0), &["-2.9", "0", "6.99"], &["-3", "7", "7.0"]);
    let format = |format: &str| Spec::json_schema(&json!({"type": "string", "format": format}));
    check(
        &format("date"),
        &["\"2024-02-29\"", "\"2000-02-29\"", "\"2023-12-31\""],
        &["\"2023-02-29\"", "\"1900-02-29\"", "\"2023-04-31\""],
    );
    check(&format("time"), &["\"23:59:59Z\""], &["\"23:59:60Z\""]);
    check(
        &format("date-time"),
        &["\"2024-02-29T00:00:00.5+01:00\""],
        &["\"2023-02-29T00:00:00Z\"", "\"2023-01-01T00:00:60Z\""],
    );
    check(&Spec::json_schema(&json!({"type": "integer", "exclusiveMinimum": 4, "maximum": 5})), &["5"], &["4", "6"]);
    check(&Spec::json_schema(&json!(true)), &["1", "[]", "\"x\""], &["", "x"]);
}

#[test]
fn expressions_choices_and_grammars() {
    check(&Spec::regex("[a-c]+(x|/)?"), &["a", "abc/", "cx"], &["", "d", "x", "ax/"]);
    check(&Spec::regex(r"\d{3}-é\n"), &["123-é\n"], &["12-é\n"]);
    check(
        &Spec::choice(&["yes", "no", "it's \"so\"\n\\", "a|b", "\u{7f}é"]),
        &["yes", "no", "it's \"so\"\n\\", "a|b", "\u{7f}é"],
        &["", "y", "a", "yesno"],
    );
    check(&Spec::choice(&["yes", "yessir"]), &["yes", "yessir"], &["yess"]);
    check(&Spec::grammar("start: \"a\"+ | b\nb: /[xy]{2}/").unwrap(), &["a", "aaa", "xy"], &["", "x", "ab"]);
    let ebnf = "root ::= item (\",\" item){1,2}\nitem ::= [a-f]+ | \"(\" root \")\" # nested";
    check(&Spec::grammar(ebnf).unwrap(), &["a,b", "ab,cd,ef", "(a,b),c"], &["a", "a,b,c,d", "(a),b"]);
    assert!(matches!(Spec::grammar("root ::= ("), Err(Error::Invalid(_))));
}

#[test]
fn a_special_token_is_allowed_by_name_only() {
    let grammar = grammars().compile_here(&Spec::regex(".*")).unwrap();
    let masks = grammar.start(true).masks().unwrap();
    let mask = masks.at(0).unwrap();
    assert!(mask.allows(300) && mask.allows(0) && !mask.allows(311) && !mask.allows(299) && !mask.allows(5000));
    let mask = grammar.start(false).masks().unwrap();
    assert!(!mask.at(0).unwrap().allows(0), "end-of-sequence is ignored");
    let grammar = grammars().compile_here(&Spec::grammar("start: <tool> \"x\"").unwrap()).unwrap();
    assert!(grammar.start(true).masks().unwrap().at(0).unwrap().allows(311));
}

#[test]
fn what_cannot_be_compiled_is_refused() {
    refused(&Spec { text: "{".into(), ..Spec::json_object() }, &["not valid JSON"]);
    refused(&Spec::json_schema(&json!({"type": "strin"})), &["strin"]);
    refused(&Spec::json_schema(&json!({"not": {"type": "string"}})), &["not"]);
    refused(&Spec::json_schema(&json!({"if": true, "then": false})), &["Unimplemented"]);
    refused(&Spec::json_schema(&json!({"type": "array", "uniqueItems": true})), &["uniqueItems"]);
    refused(&Spec::json_schema(&json!({"$ref": "#/$defs/nowhere"})), &["nowhere"]);
    refused(&Spec::json_schema(&json!({"$ref": "https://example.com/x.json"})), &["example.com"]);
    refused(&Spec::json_schema(&json!({"type": "string", "pattern": "(?=a)"})), &[]);
    refused(&Spec::json_schema(&json!({"type": "string", "format": "color"})), &["color"]);
    refused(&Spec::json_schema(&json!({"type": "integer", "minimum": 5, "maximum": 4})), &[]);
    refused(&Spec::json_schema(&json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})), &["oneOf"]);
    refused(&Spec::json_schema(&json!({"dependencies": {"a": ["b"]}})), &["dependencies"]);
    refused(&Spec::json_schema(&json!(false)), &["false"]);
    refused(&Spec::regex("(a"), &[]);
    refused(&Spec::regex("[^\\s\\S]"), &[]);
    refused(&Spec::grammar("start: nowhere").unwrap(), &["nowhere"]);
    refused(&Spec::grammar("x: \"a\"").unwrap(), &["start"]);
    refused(&Spec::grammar("start: <nobody>").unwrap(), &[]);
    refused(&Spec::grammar("").unwrap(), &[]);
    refused(&Spec::regex(&"a?".repeat(20_000)), &["40000 bytes", "8192"]);
    refused(
        &Spec::json_schema(&json!({"items": {"pattern": "a?".repeat(20_000)}})),
        &["#/items", "40000 bytes", "8192"],
    );
    refused(&Spec::json_schema(&json!({"patternProperties": {"a?".repeat(20_000): true}})), &["40000 bytes"]);
    refused(&Spec::choice::<&str>(&[]), &["no choice"]);
    refused(&Spec { text: "[1]".into(), ..Spec::choice(&["x"]) }, &["list of strings"]);
}

/// Deep, wide and absurd texts end in an answer, in bounded time, whichever it is.
#[test]
fn odd_texts_are_survived() {
    let grammars = grammars();
    let deep = |open: &str, close: &str, depth: usize| format!("{}{}", open.repeat(depth), close.repeat(depth));
    let mut reference = json!({"type": "integer"});
    for _ in 0..60 {
        reference = json!({"anyOf": [reference, {"type": "array", "items": {"$ref": "#"}}]});
    }
    let specs = [
        Spec { text: deep("[", "]", 100_000), ..Spec::json_object() },
        Spec { text: deep(r#"{"items":"#, "}", 120), ..Spec::json_object() },
        Spec { text: format!(r#"{}{{}}{}"#, r#"{"items":"#.repeat(120), "}".repeat(120)), ..Spec::json_object() },
        Spec::json_schema(&json!({"$ref": "#"})),
        Spec::json_schema(&json!({"allOf": [{"$ref": "#"}]})),
        Spec::json_schema(
            &json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        ),
        Spec::json_schema(&reference),
        Spec::json_schema(&json!({"type": "string", "minLength": 1_000_000_000u64})),
        Spec::json_schema(&json!({"type": "string", "pattern": "(a{1000}){1000}"})),
        Spec::json_schema(&json!({"type": "array", "minItems": 100_000_000})),
        Spec::json_schema(&json!({"type": "object", "minProperties": 100_000})),
        Spec::json_schema(&json!({"type": "number", "multipleOf": 1e-300, "minimum": 1e300})),
        Spec::json_schema(&json!({"type": "integer", "minimum": -1e308, "maximum": 1e308})),
        Spec::json_schema(&json!({"properties": 5, "required": "x", "type": ["string", 7]})),
        Spec::json_schema(&json!({"enum": []})),
        Spec::json_schema(&json!({"$id": 7, "$schema": {}, "$defs": []})),
        Spec::json_schema(
            &json!({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": true}),
        ),
        Spec { whitespace: Some("(".into()), ..Spec::json_object() },
        Spec { whitespace: Some("x*".into()), ..Spec::json_object() },
        Spec::regex(&deep("(", ")", 50_000)),
        Spec::regex("((a{500}){500}){500}"),
        Spec::regex("(a|b|ab)*{3}"),
        Spec::regex(&"a?".repeat(4_000)),
        Spec::regex("((a?){1000}){1000}"),
        Spec::choice(&(0..3_000).map(|n| format!("choice {n}")).collect::<Vec<_>>()),
        Spec::json_schema(&json!({"enum": (0..3_000).map(|n| format!("choice {n}")).collect::<Vec<_>>()})),
        Spec::regex("\u{0}\u{10ffff}"),
        Spec::grammar(&format!("start: {}", deep("(", ")", 100_000))).unwrap(),
        Spec::grammar(&format!("start: {}\"a\"{}", "(".repeat(2_000), ")".repeat(2_000))).unwrap(),
        Spec::grammar("start: start").unwrap(),
        Spec::grammar("start: a\na: b\nb: a | \"x\"").unwrap(),
        Spec::grammar("start: /(/").unwrap(),
        Spec::grammar("start: %json {\"type\": \"nonsense\"}").unwrap(),
        Spec::grammar("start: \"a\"{0,4000000000}").unwrap(),
        Spec::grammar("start: /a/ | \"\\u0000\"\n%ignore /.*/").unwrap(),
        Spec::choice(&[""]),
    ];
    for spec in specs {
        if let Ok(grammar) = grammars.compile_here(&spec) {
            let mut matcher = grammar.start(true);
            // Whatever is allowed can be taken, for a while.
            for step in 0..20u32 {
                let Ok(masks) = matcher.masks() else { break };
                let mask = masks.at(0).unwrap();
                let allowed: Vec<TokenId> = (1..333).filter(|token| mask.allows(*token)).collect();
                if allowed.is_empty() || matcher.is_complete() {
                    break;
                }
                let token = allowed[(step as usize * 7) % allowed.len()];
                if matcher.advance(token).is_err() {
                    break;
                }
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, ..Default::default() })]

    #[test]
    fn random_texts_are_survived(kind in 0..3usize, text in "[\\[\\](){}|*+?.^$\\\\a-c\"':,0-9 \n/<>%@~-]{0,40}") {
        thread_local!(static GRAMMARS: Grammars = grammars());
        let kind = [Kind::JsonSchema, Kind::Regex, Kind::Lark][kind];
        let text = if kind == Kind::Lark { format!("start: {text}") } else { text };
        GRAMMARS.with(|grammars| drop(grammars.compile_here(&Spec { kind, text, whitespace: None, thoughts: None })));
    }
}

#[test]
fn replay_and_guesses_lead_to_the_same_masks() {
    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "number"},
        "list": {"type": "array", "items": {"enum": ["ab", "abc", true]}}}, "required": ["name", "n", "list"]});
    let grammar = grammars().compile_here(&Spec::json_schema(&schema)).unwrap();
    let text = r#"{"name":"aé","n":-1.5e3,"list":["ab", "abc",true]}"#;
    let tokens = tokens(text);
    let mut straight = grammar.start(true);
    for at in 0..tokens.len() {
        let mut replayed = grammar.start(true);
        replayed.replay(&tokens[..at]).unwrap();
        assert_eq!(replayed.masks().unwrap(), straight.masks().unwrap(), "at {at}");
        // Guesses: right for a while, then wrong.
        let right = at % 5;
        let mut drafts: Vec<TokenId> = tokens[at..tokens.len().min(at + right)].to_vec();
        let given = drafts.len();
        drafts.push(2);
        straight.prepare(&drafts);
        let masks = straight.masks().unwrap();
        for position in 0..given {
            let mut expected = grammar.start(true);
            expected.replay(&tokens[..at + position]).unwrap();
            assert_eq!(masks.at(position), expected.masks().unwrap().at(0), "at {at} + {position}");
        }
        assert!(masks.at(given + 1).is_none());
        assert_eq!(straight.allowed(&drafts), given);
        straight.advance(tokens[at]).unwrap();
        let copy = straight.clone();
        assert_eq!(copy.is_complete(), at + 1 == tokens.len());
    }
    assert!(straight.is_complete(), "nothing follows the last brace");
    assert!(straight.advance(tokens[0]).is_err());
    assert!(matches!(straight.masks(), Err(Error::Lost(_))), "what went wrong once stays wrong");
}

#[test]
fn a_token_that_does_not_fit_is_named() {
    let grammar = grammars().compile_here(&Spec::choice(&["yes", "no"])).unwrap();
    let mut matcher = grammar.start(true);
    matcher.advance(tokens("y")[0]).unwrap();
    let error = matcher.advance(tokens("n")[0]).unwrap_err().to_string();
    assert!(error.starts_with("token 111 at 1 does not fit the grammar"), "{error}");
    assert_eq!(matcher.clone().masks().unwrap_err().to_string(), error);
}

#[test]
fn grammars_are_compiled_once_and_forgotten_in_order() {
    let grammars = Grammars::new(bytes(), Limits { kept: 2, ..Limits::default() }, 1).unwrap();
    let get = |text: &str| grammars.compile_here(&Spec::regex(text)).unwrap();
    let (a, b) = (get("a"), get("b"));
    assert!(Arc::ptr_eq(&a, &get("a")));
    get("c");
    assert!(Arc::ptr_eq(&a, &get("a")), "used after b");
    assert!(!Arc::ptr_eq(&b, &get("b")));
    let spaced = Spec { whitespace: Some(String::new()), ..Spec::json_object() };
    assert!(!Arc::ptr_eq(
        &grammars.compile_here(&spaced).unwrap(),
        &grammars.compile_here(&Spec::json_object()).unwrap()
    ));
}

#[test]
fn compiling_threads_answer_within_their_bounds() {
    let (sender, receiver) = mpsc::channel();
    let ask = |grammars: &Grammars, tokens: &[TokenId]| {
        let sender = sender.clone();
        grammars.resume(Spec::choice(&["yes", "no"]), tokens.to_vec(), true, move |result| {
            sender.send(result.map(|matcher| matcher.is_complete())).unwrap();
        });
        receiver.recv().unwrap()
    };
    let good = grammars();
    assert_eq!(ask(&good, &[]), Ok(false));
    assert_eq!(ask(&good, &tokens("yes")), Ok(true));
    assert_eq!(ask(&good, &[305]), Ok(true), "as one token");
    assert!(matches!(ask(&good, &tokens("x")), Err(Error::Lost(_))));
    let full = Grammars::new(bytes(), Limits { waiting: 0, ..Limits::default() }, 1).unwrap();
    assert_eq!(ask(&full, &[]), Err(Error::Busy(0)));
    let hurried = Grammars::new(bytes(), Limits { patience: Duration::ZERO, ..Limits::default() }, 1).unwrap();
    assert!(matches!(ask(&hurried, &[]), Err(Error::Invalid(_))));
}

/// Tokens of `text`, in which `<think>` and `</think>` are the tokens of that name.
fn thinking(text: &str) -> Vec<TokenId> {
    let mut out = Vec::new();
    for (i, part) in text.split("<think>").enumerate() {
        out.extend((i > 0).then_some(312));
        for (i, part) in part.split("</think>").enumerate() {
            out.extend((i > 0).then_some(313));
            out.extend(tokens(part));
        }
    }
    out
}

#[test]
fn a_grammar_holds_behind_reasoning() {
    let spec = |begun, budget, marks: [&str; 2]| {
        let [start, end] = marks.map(str::to_owned);
        Spec { thoughts: Some(Thoughts { start, end, begun, budget }), ..Spec::choice(&["yes", "no"]) }
    };
    let whole = |spec: &Spec, output: Vec<TokenId>| {
        let grammar = grammars().compile_here(spec).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
        let mut matcher = grammar.start(true);
        for token in output {
            if matcher.is_complete() || !matcher.masks().unwrap().at(0).unwrap().allows(token) {
                return false;
            }
            matcher.advance(token).unwrap();
        }
        matcher.is_complete() || matcher.masks().unwrap().at(0).unwrap().allows(0)
    };
    let check = |begun, budget, text: &str, expected| {
        let tokens = spec(begun, budget, ["<think>", "</think>"]);
        assert_eq!(whole(&tokens, thinking(text)), expected, "{text:?}, {budget:?}, as tokens");
        if budget.is_none() {
            let marks = ["<r>", "</r>"];
            let text = text.replace("think>", "r>");
            assert_eq!(whole(&spec(begun, None, marks), self::tokens(&text)), expected, "{text:?}");
        }
    };
    check(true, None, "No, ye.</think>\n\nyes", true);
    check(true, None, "</think>no", true);
    check(true, None, "</think>\n\n\nno", false);
    check(true, None, "no", false);
    check(true, None, "hm</think>maybe", false);
    check(false, None, "yes", true);
    check(false, None, "<think>hm</think>yes", true);
    check(false, None, "<think>hm", false);
    check(false, None, "hm</think>yes", false);
    check(true, Some(2), "hm</think>no", true);
    check(true, Some(2), "hmm</think>no", false);
    check(true, Some(1 << 20), "hm</think>no", true);
    check(false, Some(0), "<think></think>no", true);
    check(false, Some(0), "<think>h</think>no", false);
    // Any token may be part of a thought, special ones too, and text that only looks like the mark; but it does not end the answer.
    let by_token = spec(true, None, ["<think>", "</think>"]);
    assert!(whole(&by_token, [vec![311, 312], tokens("</think>"), vec![313], tokens("no")].concat()));
    assert!(!whole(&by_token, vec![0]));
    refused(&spec(true, Some(3), ["<r>", "</r>"]), &["budget", "</r>"]);
    let anything = Spec { thoughts: by_token.thoughts, ..Spec::anything() };
    assert!(whole(&anything, [thinking("hm</think>"), vec![311], tokens("x\n")].concat()));
}
