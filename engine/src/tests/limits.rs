//! Rows and settings that the engine refuses.

use super::{load, small_config, watched};
use crate::{Config, Engine, Error, Row, Sample, Yield};
use kv_cache::PageId;

fn engine(config: Config) -> Result<Engine, Error> {
    Engine::new(load("tests/golden/llama"), &config)
}

#[test]
fn bad_rows_are_named_and_nothing_is_computed() {
    let mut engine = engine(small_config()).expect("an engine");
    let pages: Vec<PageId> = (0..64).map(PageId).collect();
    let long = vec![1; 513];
    let mut refused = |rows: &[Row<'_>], words: &[&str]| {
        let mut layers = 0;
        let error = engine.step(rows, &mut |_| layers += 1).expect_err("a bad row");
        let Error::Row(problem) = &error else { panic!("{error:?}") };
        for word in words {
            assert!(problem.contains(word), "{problem:?} lacks {word:?}");
        }
        assert_eq!(layers, 0);
    };
    let row = Row { tokens: &[1, 2], start: 0, pages: &pages, ..Row::default() };
    refused(&[row, Row { pages: &pages[1..], ..row }, row], &["row 2", "page 0", "twice"]);
    refused(&[Row { start: 15, pages: &[PageId(3), PageId(3)], ..row }], &["row 0", "page 3", "twice"]);
    refused(&[row, Row { tokens: &[1, 1031], ..row }], &["row 1", "1031"]);
    refused(&[Row { start: 1023, ..row }], &["row 0", "1025", "1024"]);
    refused(&[Row { start: usize::MAX, ..row }], &["row 0", "1024"]);
    refused(&[Row { tokens: &[], ..row }], &["row 0"]);
    refused(&[Row { start: 15, pages: &pages[..1], ..row }], &["row 0", "17", "2 are needed"]);
    refused(&[Row { pages: &[PageId(1 << 30)], ..row }], &["row 0", "1073741824"]);
    refused(&[Row { tokens: &long, ..row }], &["513", "512"]);
    refused(&[row; 17], &["17", "16"]);
}

#[test]
fn bad_settings_name_the_field() {
    let check = |config: Config, expected: &str| {
        let error = engine(config).expect_err("a bad setting");
        let Error::Setting { field, .. } = error else { panic!("{error:?}") };
        assert_eq!(field, expected);
    };
    check(Config { kv_bytes: Some(100), ..small_config() }, "kv_bytes");
    check(Config { page_tokens: 0, ..small_config() }, "page_tokens");
    check(Config { token_budget: 0, ..small_config() }, "token_budget");
    check(Config { max_sequences: 0, ..small_config() }, "max_sequences");
    check(Config { threads: Some(0), ..small_config() }, "threads");
    check(Config { max_model_len: Some(0), ..small_config() }, "max_model_len");
    check(Config { max_model_len: Some(1025), ..small_config() }, "max_model_len");
    check(Config { kv_bytes: Some(64 << 10), ..small_config() }, "max_model_len");
}

#[test]
fn the_longest_sequence_follows_the_pages_when_nobody_says() {
    let engine = engine(Config { kv_bytes: Some(64 << 10), max_model_len: None, ..small_config() }).expect("an engine");
    let layout = engine.memory().layout();
    assert_eq!(engine.max_model_len(), (layout.pages * layout.page_tokens) as usize);
    assert!(engine.max_model_len() < 1024);
}

#[test]
fn an_empty_step_and_one_without_samples_are_fine() {
    let mut engine = engine(small_config()).expect("an engine");
    assert_eq!(engine.step(&[], &mut |_| {}).expect("a step"), []);
    let pages: Vec<PageId> = (0..2).map(PageId).collect();
    let mut layers = Vec::new();
    let row = Row { tokens: &[1, 2, 3], start: 0, pages: &pages, ..Row::default() };
    assert_eq!(engine.step(&[row], &mut |layer| layers.push(layer)).expect("a step"), [Yield::default()]);
    assert_eq!(layers, [0, 1, 2]);
    assert!(engine.logits(0).is_none() && engine.logits(1).is_none());

    let sampling = watched();
    let sample = Sample {
        sampling: &sampling,
        history: &[1, 2, 3, 4],
        prompt_tokens: 4,
        forbidden: &[],
        min_tokens: 0,
        grammar: None,
    };
    let other = Row { pages: &pages[1..], ..row };
    let rows = [other, Row { tokens: &[4], start: 3, pages: &pages, sample: Some(sample), ..Row::default() }];
    let sampled = engine.step(&rows, &mut |_| {}).expect("a step");
    assert_eq!((sampled[0].sampled.len(), sampled[1].sampled.len()), (0, 1));
    assert!(engine.logits(0).is_none() && engine.logits(1).is_some());
}
