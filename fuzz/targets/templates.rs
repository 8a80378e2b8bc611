//! A chat template, and behind a zero byte the messages it is rendered with.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| router::fuzz::template(input));
