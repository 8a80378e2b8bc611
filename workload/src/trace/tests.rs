use super::*;
use proptest::prelude::*;
use std::io::Write;

const MOONCAKE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/traces/mooncake_conversation_300.jsonl");
const AZURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/traces/azure_conv_20.csv");

fn read(text: &str, format: Format) -> Result<Trace, Error> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    Trace::read(file.path(), format)
}

/// Checks that `text` is refused at `line` for a reason that says all of `words`.
fn check_refused(text: &str, format: Format, at: usize, words: &[&str]) {
    match read(text, format) {
        Err(Error::Line { line, problem, .. }) => {
            assert_eq!(line, at, "{problem}");
            for word in words {
                assert!(problem.contains(word), "{problem:?} says {word:?}");
            }
        }
        other => panic!("{text:?} was read as {other:?}"),
    }
}

#[test]
fn mooncakes_slice_is_read() {
    let trace = Trace::read(Path::new(MOONCAKE), Format::Mooncake).unwrap();
    assert_eq!(trace.requests.len(), 300);
    let first = &trace.requests[0];
    assert_eq!((first.at, first.input_tokens, first.output_tokens), (Duration::ZERO, 6758, 500));
    assert_eq!(first.blocks, (0..14).collect::<Vec<_>>());
    assert!(trace.requests.is_sorted_by_key(|request| request.at));
}

#[test]
fn azures_rows_are_read() {
    let trace = Trace::read(Path::new(AZURE), Format::Azure).unwrap();
    assert_eq!(trace.requests.len(), 20);
    assert_eq!((trace.requests[0].at, trace.requests[0].input_tokens), (Duration::ZERO, 374));
    assert_eq!(trace.requests[1].at, Duration::from_nanos(4_314_579_000));
    let blocks: Vec<u64> = trace.requests.iter().flat_map(|request| request.blocks.clone()).collect();
    assert_eq!(blocks, (0..blocks.len() as u64).collect::<Vec<_>>(), "no prompt has anything in common");
}

#[test]
fn a_conversation_is_a_request_for_each_answer() {
    let text = format!(
        r#"[{{"id": "a", "conversations": [{{"from": "human", "value": "{}"}}, {{"from": "gpt", "value": "12345"}},
            {{"from": "human", "value": "1234"}}, {{"from": "gpt", "value": "1"}}]}},
           {{"messages": [{{"role": "assistant", "content": "hello"}}, {{"role": "user", "content": "x"}},
            {{"role": "assistant", "content": "y"}}]}}]"#,
        "x".repeat(4 * 600)
    );
    let trace = read(&text, Format::ShareGpt).unwrap();
    let shapes: Vec<_> = trace.requests.iter().map(|r| (r.input_tokens, r.output_tokens, r.blocks.clone())).collect();
    assert_eq!(shapes, [(600, 2, vec![0, 1]), (603, 1, vec![0, 1]), (3, 1, vec![2])]);
    let prompts: Vec<_> = trace.requests.iter().map(|request| request.tokens(512, 1000)).collect();
    assert_eq!(prompts[1][..600], prompts[0]);
    assert_ne!(prompts[2][..3], prompts[0][..3]);
}

#[test]
fn what_is_wrong_is_named() {
    let good = r#"{"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [1]}"#;
    let mooncake = |line: &str, words: &[&str]| check_refused(&format!("{good}\n\n{line}"), Format::Mooncake, 3, words);
    mooncake("{}", &["timestamp"]);
    mooncake("12", &["Line"]);
    mooncake(&good.replace("[1]", "[1, 2]"), &["hash_ids has 2 ids", "wants 1", "512"]);
    mooncake(&good.replace("\": 3", "\": -3"), &["-3"]);
    mooncake(&good.replace("\": 3", "\": 0"), &["input_length is 0", "from 1"]);
    mooncake(&good.replace("\": 4", "\": 0"), &["output_length is 0"]);
    mooncake(&good.replace("\": 4", "\": 99999999999"), &["output_length is 99999999999"]);
    mooncake(&good.replace("\": 0", "\": -1"), &["timestamp is -1", "milliseconds"]);
    mooncake(&good.replace("\"hash_ids\"", "\"ids\""), &["hash_ids"]);

    let azure = |row: &str, words: &[&str]| {
        check_refused(&format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{row}"), Format::Azure, 2, words);
    };
    azure("2023-11-16 18:15:46.68,3", &["2 fields", "3"]);
    azure("2023-11-16 18:15:46.68,x,3", &["ContextTokens", "\"x\""]);
    azure("2023-11-16 18:15:46.68,3,0", &["GeneratedTokens is 0"]);
    azure("yesterday,3,3", &["TIMESTAMP", "yesterday", "2023"]);
    check_refused("time,in,out\n", Format::Azure, 1, &["time,in,out", "ContextTokens"]);

    check_refused("[\n{\"conversations\": [{\"from\": 1}]}]", Format::ShareGpt, 2, &["string"]);
    for format in [Format::Mooncake, Format::Azure] {
        assert!(matches!(read("", format), Err(Error::Empty { .. })));
    }
    assert!(matches!(read("[]", Format::ShareGpt), Err(Error::Empty { .. })));
    assert!(matches!(Trace::read(Path::new("/nowhere"), Format::Azure), Err(Error::Unreadable { .. })));
}

#[test]
fn formats_are_known_by_name_and_ending() {
    assert_eq!(Format::of(Path::new("a/b.jsonl")), Some(Format::Mooncake));
    assert_eq!(Format::of(Path::new("b.csv")), Some(Format::Azure));
    assert_eq!(Format::of(Path::new("b.json")), Some(Format::ShareGpt));
    assert_eq!(Format::of(Path::new("b")), None);
    assert_eq!(Trace::read(Path::new(AZURE), None).unwrap(), Trace::read(Path::new(AZURE), Format::Azure).unwrap());
    assert!(matches!(Trace::read(Path::new("/nowhere/b"), None), Err(Error::UnknownFormat { .. })));
    assert_eq!("azure".parse(), Ok(Format::Azure));
    assert!("burstgpt".parse::<Format>().unwrap_err().contains("mooncake, azure or sharegpt"));
}

#[test]
fn slices_begin_at_zero() {
    let trace = Trace::read(Path::new(MOONCAKE), Format::Mooncake).unwrap();
    let seconds = Duration::from_secs;
    let window = trace.clone().window(seconds(9)..seconds(20));
    let expected = trace.requests.iter().filter(|request| (seconds(9)..seconds(20)).contains(&request.at));
    assert!(window.requests.iter().map(|request| request.at + seconds(9)).eq(expected.map(|request| request.at)));
    assert!(window.requests.len() > 3);
    assert_eq!(trace.clone().first(7).requests, trace.requests[..7]);
    assert_eq!(trace.clone().faster(4.0).span(), trace.span() / 4);
}

#[test]
fn arrivals_replace_those_of_the_trace() {
    let trace = Trace::uniform(5, 40, 3, 16).arriving(Arrivals::Constant, 2.0, 0);
    let times: Vec<u128> = trace.requests.iter().map(|request| request.at.as_millis()).collect();
    assert_eq!(times, [0, 500, 1000, 1500, 2000]);
    assert_eq!(trace.rate(), Some(2.0));
    assert_eq!(Trace::uniform(5, 40, 3, 16).rate(), None);
}

#[test]
fn uniform_prompts_share_what_was_asked_for() {
    let trace = Trace::uniform(3, 40, 3, 35);
    let prompts: Vec<_> = trace.requests.iter().map(|request| request.tokens(trace.block_tokens, 5000)).collect();
    assert!(prompts.iter().all(|prompt| prompt.len() == 40 && prompt[..32] == prompts[0][..32]));
    assert_ne!(prompts[1][32..], prompts[0][32..]);
    assert_ne!(prompts[1][32..], prompts[2][32..]);
}

proptest! {
    #[test]
    fn equal_leading_blocks_are_equal_leading_tokens(
        shared in proptest::collection::vec(0u64..1000, 0..5),
        (a, b) in (1000u64..2000, 2000u64..3000),
        block_tokens in 8usize..40,
        vocabulary in 1000u32..200_000,
    ) {
        let prompt = |last: u64| {
            let blocks: Vec<u64> = shared.iter().copied().chain([last]).collect();
            let request = Request { at: Duration::ZERO, input_tokens: blocks.len() * block_tokens - 1, output_tokens: 1, blocks };
            request.tokens(block_tokens, vocabulary)
        };
        let (one, other) = (prompt(a), prompt(b));
        let common = shared.len() * block_tokens;
        prop_assert_eq!(&one[..common], &other[..common]);
        prop_assert_ne!(&one[common..], &other[common..]);
        prop_assert_eq!(one.len(), common + block_tokens - 1);
        prop_assert!(one.iter().all(|&token| token < vocabulary));
    }

    #[test]
    fn scaling_keeps_what_prompts_have_in_common(factor in 0.001f64..3.0) {
        let trace = Trace::read(Path::new(MOONCAKE), Format::Mooncake).unwrap();
        let scaled = trace.clone().scaled(factor);
        for (before, after) in trace.requests.iter().zip(&scaled.requests) {
            prop_assert_eq!(&before.blocks, &after.blocks);
            prop_assert_eq!(after.input_tokens.div_ceil(scaled.block_tokens), after.blocks.len());
            prop_assert!(after.output_tokens >= 1);
        }
    }
}

/// The same requests give the same prompts in every build: figures of two releases can be compared.
#[test]
fn prompts_stay_what_they_are() {
    let request = Request { at: Duration::ZERO, input_tokens: 5, output_tokens: 1, blocks: vec![0, 1] };
    assert_eq!(request.tokens(4, 512), [334, 85, 261, 499, 188]);
    assert_eq!(request.tokens(4, 1), [0; 5]);
}
