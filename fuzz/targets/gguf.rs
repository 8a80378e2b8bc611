//! A GGUF file: the container, then what the engine and the router make of it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{cell::RefCell, fs};
use tempfile::TempDir;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(tempfile::tempdir().expect("a directory"));
}

// The router catches panics of the tokenizer library, so the hook that ends the process at once must go; what nobody catches ends
// it still.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    let Ok(file) = gguf::File::parse(input, input.len() as u64) else { return };
    for (_, value) in file.metadata() {
        if let gguf::Value::Array(array) = value {
            assert!(array.iter().count() <= input.len());
        }
    }
    for (_, tensor) in file.tensors() {
        assert!(tensor.bytes.end <= input.len());
    }
    DIRECTORY.with_borrow(|dir| {
        let path = dir.path().join("model.gguf");
        fs::write(&path, input).expect("written");
        let _ = engine::Model::load(&path, &mut |_| {});
        router::fuzz::model(&path);
    });
});
