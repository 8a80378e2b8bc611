//! Bodies of `/v1/chat/completions` and `/v1/completions`.

#![no_main]

use router::fuzz::Bodies;
use std::path::Path;

thread_local! {
    static BODIES: Bodies = Bodies::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo"));
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| BODIES.with(|bodies| bodies.read(input)));
