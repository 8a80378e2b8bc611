//! The tokens that end a sequence.

use crate::{Error, File, Value};
use std::collections::BTreeSet;

const KEYS: [&str; 3] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Texts of control tokens that end a turn or a document, in the families that GGUF files exist of.
const TEXTS: [&str; 13] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// What `tokenizer.ggml.token_type` calls a control token.
const CONTROL: u64 = 3;

pub(crate) fn end_tokens(file: &File<'_>) -> Result<BTreeSet<u32>, Error> {
    let mut ends = BTreeSet::new();
    for key in KEYS {
        // Writers put -1 or its unsigned twin where there is none.
        let Some(id) = file.get(key).filter(|id| !matches!(id, Value::Signed(-1) | Value::Unsigned(0xffff_ffff)))
        else {
            continue;
        };
        let token = id.as_count().and_then(|id| u32::try_from(id).ok());
        ends.insert(token.ok_or_else(|| Error::invalid(format!("metadata `{key}` is {id}, expected a token's id")))?);
    }
    let tokens = file.array("tokenizer.ggml.tokens")?.into_iter().flatten();
    let types = file.array("tokenizer.ggml.token_type")?.into_iter().flatten();
    for (id, (token, kind)) in tokens.zip(types).enumerate() {
        if kind.as_count() == Some(CONTROL) && token.as_str().is_some_and(|text| TEXTS.contains(&text)) {
            ends.insert(id as u32);
        }
    }
    Ok(ends)
}
