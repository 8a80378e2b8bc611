//! What a router sends to a worker, as gRPC hands it over.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| attach::fuzz::frame(input));
