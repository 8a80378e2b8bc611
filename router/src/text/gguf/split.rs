//! How byte-level BPE cuts a text into words before it merges: `tokenizer.ggml.pre` names one of a few ways.
//!
//! The expressions are those of the `tokenizer.json` of the models that the names come from, and so is the normalisation, which GGUF
//! files do not record.

use anyhow::bail;
use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// One way to cut.
#[derive(Debug)]
pub(super) struct Words {
    /// Names that files have for it.
    names: &'static [&'static str],
    /// Each cuts what the ones before it left whole.
    patterns: &'static [&'static str],
    /// Whether text is composed first (Unicode NFC).
    composed: bool,
    /// Whether a word that is a token is taken as it is, without merging.
    pub(super) whole_words: bool,
    /// Whether a text begins with BOS if the file does not say.
    pub(super) adds_bos: bool,
}

const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const WORDS: [Words; 9] = {
    const fn words(names: &'static [&'static str], patterns: &'static [&'static str]) -> Words {
        Words { names, patterns, composed: false, whole_words: false, adds_bos: false }
    }
    [
        words(&["default", "gpt-2", "phi-2", "mpt", "jais", "trillion"], &[GPT2]),
        Words { composed: true, ..words(&["olmo"], &[GPT2]) },
        Words {
            whole_words: true,
            adds_bos: true,
            ..words(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"], &[LLAMA3])
        },
        words(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
        Words { composed: true, ..words(&["qwen2", "stablelm2", "deepseek-r1-qwen"], &[QWEN2]) },
        Words { composed: true, ..words(&["qwen35"], &[QWEN35]) },
        Words { whole_words: true, adds_bos: true, ..words(&["tekken"], &[TEKKEN]) },
        words(&["gpt-4o", "llama4"], &[GPT4O]),
        words(&["deepseek-v3"], &[r"\p{N}{1,3}", r"[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3]),
    ]
};

/// Cuts off every digit, then as GPT-2 does.
const DIGITS: [Words; 2] = {
    const fn words(names: &'static [&'static str], composed: bool) -> Words {
        Words { names, patterns: &[r"\p{N}", GPT2], composed, whole_words: false, adds_bos: false }
    }
    [words(&["command-r"], true), words(&["starcoder", "refact", "smollm", "codeshell", "exaone"], false)]
};

impl Words {
    /// Returns the way called `name`.
    pub(super) fn named(name: &str) -> anyhow::Result<&'static Self> {
        let all = || WORDS.iter().chain(&DIGITS);
        let Some(words) = all().find(|words| words.names.contains(&name)) else {
            let known: Vec<&str> = all().flat_map(|words| words.names).copied().collect();
            bail!("metadata `tokenizer.ggml.pre`: `{name}` is not supported; known: {}", known.join(", "));
        };
        Ok(words)
    }

    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.composed.then(|| NFC.into())
    }

    pub(super) fn pre_tokenizer(&self) -> anyhow::Result<PreTokenizerWrapper> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in self.patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(split.map_err(|error| anyhow::anyhow!("{error}"))?.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_compiles_and_has_its_own_names() {
        let mut names: Vec<&str> = Vec::new();
        for words in WORDS.iter().chain(&DIGITS) {
            words.pre_tokenizer().expect("the expressions compile");
            names.extend(words.names);
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        let error = Words::named("kimi").expect_err("not known").to_string();
        assert!(error.contains("`kimi`") && error.contains("qwen2"), "{error}");
    }
}
