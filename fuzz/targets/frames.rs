//! What a peer says to a worker: a greeting, a control connection or a data connection, as the first byte says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs::File;

thread_local! {
    static POOL: File = tempfile::tempfile().expect("a file");
}

fuzz_target!(|input: &[u8]| POOL.with(|pool| kv_transfer::fuzz_frames(input, pool)));
