//! A real prefill worker and a real decode worker, with the test as their router.
//!
//! Every output is compared with the recorded reference of `tests/golden/llama`, so a page that lands wrongly, a token that is
//! computed twice or a sequence that resumes at the wrong place shows as a wrong token.

mod cases;
mod fetches;
mod router;
mod workers;
