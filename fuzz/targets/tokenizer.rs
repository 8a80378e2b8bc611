//! A `tokenizer.json`, and its template where the input goes on with one after a zero byte.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{cell::RefCell, fs};
use tempfile::TempDir;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new({
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("config.json"), r#"{"vocab_size": 300, "eos_token_id": 2}"#).expect("written");
        dir
    });
}

// The router catches panics of the tokenizer library, so the hook that ends the process at once must go; what nobody catches ends
// it still.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    DIRECTORY.with_borrow(|dir| {
        let (tokenizer, settings) = match input.iter().position(|byte| *byte == 0) {
            Some(end) => (&input[..end], &input[end + 1..]),
            None => (input, &b"{}"[..]),
        };
        fs::write(dir.path().join("tokenizer.json"), tokenizer).expect("written");
        fs::write(dir.path().join("tokenizer_config.json"), settings).expect("written");
        router::fuzz::model(dir.path());
    });
});
