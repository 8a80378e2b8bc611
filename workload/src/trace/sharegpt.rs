//! Conversations like ShareGPT's: who said what, without times and without tokens.

use super::{Error, Request, Trace};
use serde::Deserialize;
use std::time::Duration;

/// English text has some four bytes a token in the vocabularies of today.
const BYTES_PER_TOKEN: usize = 4;

#[derive(Deserialize)]
struct Conversation {
    /// Files of other origin call them so.
    #[serde(alias = "messages")]
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(alias = "role")]
    from: String,
    #[serde(alias = "content")]
    value: String,
}

impl Turn {
    fn is_answer(&self) -> bool {
        matches!(self.from.as_str(), "gpt" | "assistant" | "chatgpt" | "bing" | "bard")
    }
}

pub(super) fn read(file: &str, text: &str) -> Result<Vec<Request>, Error> {
    let conversations: Vec<Conversation> = serde_json::from_str(text).map_err(|problem| Error::Line {
        file: file.to_owned(),
        line: problem.line(),
        problem: problem.to_string(),
    })?;
    let mut next_block = 0;
    let mut requests = Vec::new();
    for conversation in &conversations {
        let mut said = 0;
        for turn in &conversation.conversations {
            let tokens = turn.value.len().div_ceil(BYTES_PER_TOKEN);
            if turn.is_answer() && said > 0 && tokens > 0 {
                // A conversation's blocks are its own. The last of a prompt is the beginning of that block in the next.
                let blocks = next_block..next_block + usize::div_ceil(said, Trace::BLOCK_TOKENS) as u64;
                let blocks = blocks.collect();
                requests.push(Request { at: Duration::ZERO, input_tokens: said, output_tokens: tokens, blocks });
            }
            said += tokens;
        }
        next_block += said.div_ceil(Trace::BLOCK_TOKENS) as u64;
    }
    Ok(requests)
}
