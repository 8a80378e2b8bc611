//! Mooncake's traces: a JSON object a line (github.com/kvcache-ai/Mooncake, `FAST25-release/traces`).

use super::{Error, Request, Trace, length};
use serde::Deserialize;
use std::time::Duration;

/// One line. Fields that later releases add are nobody's concern here.
#[derive(Deserialize)]
struct Line {
    /// Milliseconds.
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

pub(super) fn read(file: &str, text: &str) -> Result<Vec<Request>, Error> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            request(line).map_err(|problem| Error::Line { file: file.to_owned(), line: index + 1, problem })
        })
        .collect()
}

fn request(line: &str) -> Result<Request, String> {
    let line: Line = serde_json::from_str(line).map_err(|problem| problem.to_string())?;
    let at = Duration::try_from_secs_f64(line.timestamp / 1e3);
    let at = at.map_err(|_| format!("timestamp is {}, it must be milliseconds from 0", line.timestamp))?;
    let input_tokens = length("input_length", line.input_length)?;
    let wanted = input_tokens.div_ceil(Trace::BLOCK_TOKENS);
    if line.hash_ids.len() != wanted {
        let (ids, per) = (line.hash_ids.len(), Trace::BLOCK_TOKENS);
        return Err(format!(
            "hash_ids has {ids} ids, an input_length of {input_tokens} wants {wanted}: one for every {per} tokens"
        ));
    }
    let output_tokens = length("output_length", line.output_length)?;
    Ok(Request { at, input_tokens, output_tokens, blocks: line.hash_ids })
}
