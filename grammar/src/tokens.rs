//! The bytes of a model's tokens.

use crate::{Error, TokenId, guarded, token_bytes};
use llguidance::toktrie::{TokRxInfo, TokTrie};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::HashMap, fmt, path::Path};

/// Longer tokens are never part of what a grammar allows (the trie's limit is 1024 bytes). Real ones stay below 200.
const MAX_TOKEN_BYTES: usize = 1000;

/// What each token adds to the text, as a prefix tree.
pub struct TokenTable {
    trie: TokTrie,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenTable").field("tokens", &self.trie.vocab_size()).finish()
    }
}

/// A token's part in the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Piece {
    /// UTF-8 or a part of it; empty where the id means nothing.
    bytes: Vec<u8>,
    /// A special token stands for itself, never for its bytes: no text makes a grammar take it.
    special: bool,
}

/// `tokenizer.json`, as far as it matters here.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    decoder: Option<Value>,
    model: Vocabulary,
}

#[derive(Deserialize)]
struct AddedToken {
    id: TokenId,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Vocabulary {
    vocab: Pieces,
}

/// BPE files map a token to its id; Unigram files list tokens with their scores.
#[derive(Deserialize)]
#[serde(untagged)]
enum Pieces {
    Named(HashMap<String, TokenId>),
    Listed(Vec<(String, f64)>),
}

impl TokenTable {
    /// Makes a table of `vocab_size` tokens (the rows of the logits), where `eos` end a sequence. `pieces` are id, bytes (UTF-8 or a
    /// part of it) and whether the token is special; ids that are missing mean nothing and are never allowed.
    ///
    /// # Errors
    /// [`Error::Tokens`] when an id is outside the vocabulary or there is more text than fits.
    pub fn from_parts(
        vocab_size: usize,
        eos: &[TokenId],
        pieces: impl IntoIterator<Item = (TokenId, Vec<u8>, bool)>,
    ) -> Result<Self, Error> {
        let mut table = vec![Piece::default(); vocab_size];
        for (id, bytes, special) in pieces {
            // A tokenizer may know more tokens than the model has logits for; nobody can draw those.
            if let Some(piece) = table.get_mut(id as usize) {
                *piece = Piece { bytes, special };
            }
        }
        Self::new(table, eos)
    }

    /// Reads `tokenizer.json` at `path`: byte-level alphabets (GPT-2) and sentence pieces with byte fallback.
    ///
    /// # Errors
    /// [`Error::Tokens`] names the file and what is wrong with it.
    pub fn read(path: &Path, vocab_size: usize, eos: &[TokenId]) -> Result<Self, Error> {
        let problem = |problem: String| Error::Tokens(format!("{}: {problem}", path.display()));
        let text = std::fs::read(path).map_err(|error| problem(error.to_string()))?;
        let file: TokenizerFile = serde_json::from_slice(&text).map_err(|error| problem(error.to_string()))?;
        let byte_level = file.decoder.as_ref().is_some_and(is_byte_level);
        let named: Vec<(TokenId, String)> = match file.model.vocab {
            Pieces::Named(map) => map.into_iter().map(|(token, id)| (id, token)).collect(),
            Pieces::Listed(list) => (0..).zip(list.into_iter().map(|(token, _)| token)).collect(),
        };
        let plain = named.iter().map(|(id, token)| (*id, &token[..]));
        // Added tokens are written as they are.
        let added = file.added_tokens.iter().map(|token| (token.id, &token.content[..], token.special));
        Self::from_texts(vocab_size, eos, byte_level, plain, added)
    }

    /// Makes a table of tokens as vocabularies spell them: in the byte-level alphabet of GPT-2, or as sentence pieces with byte
    /// fallback. `added` tokens are spelled as they are, come last (they may repeat plain ones), and say whether they are special.
    ///
    /// # Errors
    /// As [`TokenTable::from_parts`].
    pub fn from_texts<'a>(
        vocab_size: usize,
        eos: &[TokenId],
        byte_level: bool,
        plain: impl IntoIterator<Item = (TokenId, &'a str)>,
        added: impl IntoIterator<Item = (TokenId, &'a str, bool)>,
    ) -> Result<Self, Error> {
        let spelled = |token| {
            let mut bytes = Vec::new();
            token_bytes(token, byte_level, &mut bytes);
            bytes
        };
        let plain = plain.into_iter().map(|(id, token)| (id, spelled(token), false));
        let added = added.into_iter().map(|(id, token, special)| (id, token.as_bytes().to_vec(), special));
        Self::from_parts(vocab_size, eos, plain.chain(added))
    }

    fn new(pieces: Vec<Piece>, eos: &[TokenId]) -> Result<Self, Error> {
        if let Some(token) = eos.iter().find(|token| **token as usize >= pieces.len()) {
            return Err(Error::Tokens(format!(
                "end-of-sequence token {token} is outside the vocabulary of {}",
                pieces.len()
            )));
        }
        let words: Vec<Vec<u8>> = pieces.into_iter().map(word).collect();
        let none = llguidance::toktrie::INVALID_TOKEN;
        let info = TokRxInfo::new(words.len() as u32, eos.first().copied().unwrap_or(none));
        // The trie's own limits are assertions.
        let trie = guarded(|| {
            let trie = TokTrie::from(&info, &words);
            Ok(if eos.is_empty() { trie } else { trie.with_eos_tokens(eos) })
        });
        Ok(Self { trie: trie.map_err(Error::Tokens)? })
    }

    /// Returns the rows of the logits.
    pub fn vocab_size(&self) -> usize {
        self.trie.vocab_size()
    }

    /// Returns the tokens that end a sequence.
    pub fn eos(&self) -> &[TokenId] {
        let none = self.trie.eos_tokens() == [llguidance::toktrie::INVALID_TOKEN];
        if none { &[] } else { self.trie.eos_tokens() }
    }

    /// Returns what `tokens` add to the text; special tokens add nothing.
    pub fn text(&self, tokens: &[TokenId]) -> Vec<u8> {
        let known = tokens.iter().filter(|token| (**token as usize) < self.vocab_size());
        let words = known.map(|token| self.trie.token(*token));
        words.filter(|word| word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER)).flatten().copied().collect()
    }

    /// Returns the token that stands for `text`, special or not.
    pub(crate) fn token(&self, text: &[u8]) -> Option<TokenId> {
        let special = [&[TokTrie::SPECIAL_TOKEN_MARKER][..], text].concat();
        (0..self.vocab_size() as TokenId).find(|id| {
            let word = self.trie.token(*id);
            word == text || word == special
        })
    }

    pub(crate) fn trie(&self) -> &TokTrie {
        &self.trie
    }
}

/// Spells a token the way the trie wants it: special ones begin with a byte that no UTF-8 text holds.
fn word(piece: Piece) -> Vec<u8> {
    let marker = TokTrie::SPECIAL_TOKEN_MARKER;
    match piece {
        Piece { bytes, .. } if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
        Piece { bytes, special: true } => [&[marker][..], &bytes].concat(),
        // Bytes that would be taken for a special token can be part of no valid text.
        Piece { bytes, .. } if bytes.first() == Some(&marker) => Vec::new(),
        Piece { bytes, .. } => bytes,
    }
}

fn is_byte_level(decoder: &Value) -> bool {
    let kind = |decoder: &Value| decoder["type"] == "ByteLevel";
    kind(decoder) || decoder["decoders"].as_array().is_some_and(|decoders| decoders.iter().any(kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn golden(name: &str) -> TokenTable {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let vocab_size = config["vocab_size"].as_u64().unwrap() as usize;
        TokenTable::read(&dir.join("tokenizer.json"), vocab_size, &[2]).unwrap()
    }

    #[test]
    fn both_kinds_of_vocabulary_spell_out_their_texts() {
        for name in ["llama", "mistral", "gemma2", "qwen2", "llama3"] {
            let table = golden(name);
            let path =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("expected_text.json");
            let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            let mut compared = 0;
            for case in expected["round_trips"].as_array().unwrap() {
                let ids = |field: &str| -> Vec<TokenId> {
                    case[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
                };
                let decoded = case["decode_skip_special"].as_str().unwrap();
                let text = table.text(&ids("ids"));
                // These decoders drop the space that the tokenizer puts before a text.
                let strips = matches!(name, "llama" | "mistral");
                let text = text.strip_prefix(b" ").filter(|_| strips).unwrap_or(&text);
                assert_eq!(String::from_utf8_lossy(text), decoded, "{name}: {}", case["text"]);
                compared += 1;
            }
            assert!(compared > 5);
        }
    }

    #[test]
    fn special_tokens_and_strangers_have_no_text() {
        let pieces = [
            (0, b"a".to_vec(), false),
            (1, b"</s>".to_vec(), true),
            (3, vec![0xff, 0x41], false),
            (9, b"z".to_vec(), false),
        ];
        let table = TokenTable::from_parts(5, &[1], pieces).unwrap();
        assert_eq!((table.vocab_size(), table.eos()), (5, &[1][..]));
        assert_eq!(table.text(&[0, 1, 2, 3, 4, 9]), b"a");
        let error = TokenTable::from_parts(5, &[5], []).unwrap_err().to_string();
        assert_eq!(error, "end-of-sequence token 5 is outside the vocabulary of 5");
        let long = [(0, vec![b'x'; 5000], false)];
        assert_eq!(TokenTable::from_parts(2, &[], long).unwrap().text(&[0]), b"");
    }

    #[test]
    fn unigram_lists_and_broken_files() {
        let dir = std::env::temp_dir().join(format!("baton-grammar-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let read = |json: Value| {
            let path = dir.join("tokenizer.json");
            std::fs::write(&path, json.to_string()).unwrap();
            TokenTable::read(&path, 4, &[])
        };
        let unigram = json!({"model": {"vocab": [["<unk>", 0.0], ["▁x", -1.0], ["<0x41>", -2.0]]}, "decoder": null});
        assert_eq!(read(unigram).unwrap().text(&[1, 2]), b" xA");
        let error = read(json!({"model": {"vocab": 7}})).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        assert!(TokenTable::read(&dir.join("none.json"), 4, &[]).unwrap_err().to_string().contains("none.json"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
