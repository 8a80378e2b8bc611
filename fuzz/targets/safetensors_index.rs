//! A directory of shards: the input is `config.json`, the index and one shard, each behind its length.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::{cell::RefCell, fs, path::Path};
use tempfile::TempDir;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(tempfile::tempdir().expect("a directory"));
}

fuzz_target!(|input: &[u8]| {
    let Some((config, rest)) = part(input) else { return };
    let Some((index, shard)) = part(rest) else { return };
    DIRECTORY.with_borrow(|dir| {
        let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("written");
        write("config.json", config);
        write("shard.safetensors", shard);
        if index.is_empty() {
            let _ = fs::remove_file(dir.path().join("model.safetensors.index.json"));
            write("model.safetensors", shard);
        } else {
            write("model.safetensors.index.json", index);
        }
        load(dir.path());
    });
});

/// Cuts off what two bytes of length stand before.
fn part(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = input.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

fn load(path: &Path) {
    let _ = engine::Model::load(path, &mut |_| {});
}
