//! What a model says, cut into pieces at bytes 0xff: every reader of calls and reasoning, whole and in pieces.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| router::fuzz::words(input));
