//! A tokenizer, built from the metadata under `tokenizer.ggml`.
//!
//! Two kinds exist. `gpt2` is byte-level BPE: merges are listed, and a name stands for the expression that cuts text into
//! words. `llama` is a sentencepiece BPE: there are scores instead of merges, two neighbours merge when together they are a token,
//! best score first, and what no token covers is spelled in bytes.

use super::split;
use anyhow::{Context, bail, ensure};
use gguf::{Array, File, Value};
use kv_cache::TokenId;
use std::collections::HashMap;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, Tokenizer as Inner,
    decoders::{byte_fallback::ByteFallback, byte_level::ByteLevel, fuse::Fuse, sequence::Sequence, strip::Strip},
    models::bpe::{BPE, BpeBuilder, Vocab},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
    processors::template::TemplateProcessing,
};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// Longest token of a sentencepiece vocabulary whose parts are looked for; real ones end at some dozens of bytes.
const MAX_PIECE_BYTES: usize = 1024;

/// What a token is for (`llama_token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The tokens of a file by id.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    tokens: Vec<(&'a str, Kind)>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(file: &File<'a>) -> anyhow::Result<Self> {
        let texts = file.array(TOKENS)?.with_context(|| format!("metadata `{TOKENS}` is missing"))?;
        ensure!(u32::try_from(texts.len()).is_ok(), "metadata `{TOKENS}` has {} entries", texts.len());
        let types = file.array(TYPES)?;
        if let Some(types) = &types {
            ensure!(types.len() == texts.len(), "metadata `{TYPES}` has {} entries for {}", types.len(), texts.len());
        }
        let mut types = types.into_iter().flatten();
        let mut tokens = Vec::new();
        for (id, text) in texts.iter().enumerate() {
            let text =
                text.as_str().with_context(|| format!("metadata `{TOKENS}`: entry {id} is {text}, not UTF-8"))?;
            let kind = match types.next().map(Value::as_count) {
                None | Some(Some(1)) => Kind::Normal,
                Some(Some(2)) => Kind::Unknown,
                Some(Some(3)) => Kind::Control,
                Some(Some(4)) => Kind::UserDefined,
                Some(Some(5)) => Kind::Unused,
                Some(Some(6)) => Kind::Byte,
                Some(_) => bail!("metadata `{TYPES}`: entry {id} is not a type, known are 1 to 6"),
            };
            tokens.push((text, kind));
        }
        Ok(Self { tokens })
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the text of a token that [`Self::id`] returned.
    pub(super) fn text(&self, id: TokenId) -> &'a str {
        self.tokens[id as usize].0
    }

    /// Returns the token whose id stands under `key`. Writers put -1 or its unsigned twin where there is none.
    pub(super) fn id(&self, file: &File<'_>, key: &str) -> anyhow::Result<Option<TokenId>> {
        let id = match file.get(key) {
            None | Some(Value::Signed(-1) | Value::Unsigned(0xffff_ffff)) => return Ok(None),
            Some(_) => file.count(key)?.unwrap_or_default(),
        };
        ensure!((id as usize) < self.len(), "metadata `{key}` is {id}, there are {} tokens", self.len());
        Ok(Some(id as TokenId))
    }

    /// Returns the ids of all tokens that text can become or come from.
    fn ids(&self) -> anyhow::Result<HashMap<&'a str, TokenId>> {
        let mut ids = HashMap::new();
        for (id, &(text, kind)) in self.tokens.iter().enumerate() {
            if kind != Kind::Unused
                && let Some(first) = ids.insert(text, id as TokenId)
            {
                bail!("metadata `{TOKENS}`: tokens {first} and {id} are both {text:?}");
            }
        }
        Ok(ids)
    }

    /// Returns the tokens that are found in a text before anything else is.
    fn added(&self) -> impl Iterator<Item = AddedToken> {
        self.tokens.iter().filter_map(|&(text, kind)| {
            let special = match kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            Some(AddedToken::from(text, special).normalized(false))
        })
    }
}

/// Builds the tokenizer that `file` describes.
pub(super) fn build(file: &File<'_>, vocabulary: &Vocabulary<'_>) -> anyhow::Result<Inner> {
    let model = file.text("tokenizer.ggml.model")?.context("metadata `tokenizer.ggml.model` is missing")?;
    let (mut inner, adds_bos) = match model {
        "gpt2" => byte_level(file, vocabulary)?,
        "llama" => (sentence_piece(file, vocabulary)?, true),
        other => bail!("metadata `tokenizer.ggml.model`: `{other}` is not supported; known: gpt2, llama"),
    };
    inner.add_tokens(vocabulary.added()).map_err(|error| anyhow::anyhow!("metadata `{TOKENS}`: {error}"))?;

    let around = |flag: &str, default: bool, id: &str| {
        let wanted = file.flag(flag)?.unwrap_or(default);
        let id = vocabulary.id(file, id)?.filter(|_| wanted);
        anyhow::Ok(id.map(|id| (vocabulary.text(id).to_owned(), id)))
    };
    let bos = around("tokenizer.ggml.add_bos_token", adds_bos, "tokenizer.ggml.bos_token_id")?;
    let eos = around("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id")?;
    if bos.is_some() || eos.is_some() {
        inner.with_post_processor(Some(surround(bos, eos)?));
    }
    Ok(inner)
}

/// Makes the step that puts tokens before and after a text.
fn surround(bos: Option<(String, TokenId)>, eos: Option<(String, TokenId)>) -> anyhow::Result<PostProcessorWrapper> {
    // Names of our own, because a token's text may hold whatever means something in a template.
    let single = [bos.as_ref().map(|_| "BOS"), Some("$A"), eos.as_ref().map(|_| "EOS")];
    let single: Vec<String> = single.into_iter().flatten().map(str::to_owned).collect();
    let named = [("BOS", bos), ("EOS", eos)];
    let named = named.into_iter().filter_map(|(name, token)| token.map(|(_, id)| (name.to_owned(), id)));
    let template = TemplateProcessing::builder()
        .try_single(single)
        .map_err(|error| anyhow::anyhow!("metadata `tokenizer.ggml.add_bos_token`: {error}"))?
        .special_tokens(named.collect::<Vec<_>>())
        .build()
        .context("metadata `tokenizer.ggml.add_bos_token`")?;
    Ok(template.into())
}

/// Builds byte-level BPE, and says whether it starts a text with BOS where the file does not.
fn byte_level(file: &File<'_>, vocabulary: &Vocabulary<'_>) -> anyhow::Result<(Inner, bool)> {
    let words = split::Words::named(file.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let merges = file.array(MERGES)?.with_context(|| format!("metadata `{MERGES}` is missing"))?;
    let mut pairs = Vec::new();
    for (index, merge) in merges.iter().enumerate() {
        let parts = merge.as_str().and_then(|merge| {
            let (space, _) = merge.char_indices().skip(1).find(|(_, char)| *char == ' ')?;
            Some((merge[..space].to_owned(), merge[space + 1..].to_owned()))
        });
        pairs.push(parts.with_context(|| format!("metadata `{MERGES}`: entry {index} is {merge}, not two tokens"))?);
    }
    let model = bpe(vocabulary, pairs)?.ignore_merges(words.whole_words).build();
    let mut inner = Inner::new(model.map_err(|error| anyhow::anyhow!("metadata `{MERGES}`: {error}"))?);
    inner.with_normalizer(words.normalizer()).map_err(|error| anyhow::anyhow!("{error}"))?;
    inner.with_pre_tokenizer(Some(words.pre_tokenizer()?));
    inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())));
    Ok((inner, words.adds_bos))
}

/// Builds a sentencepiece BPE.
fn sentence_piece(file: &File<'_>, vocabulary: &Vocabulary<'_>) -> anyhow::Result<Inner> {
    let scores = file.array(SCORES)?.with_context(|| format!("metadata `{SCORES}` is missing"))?;
    let of_kind = |kind: Kind| vocabulary.tokens.iter().find(move |token| token.1 == kind).map(|token| token.0);
    let mut builder = bpe(vocabulary, merges(vocabulary, scores)?)?.fuse_unk(true);
    builder = builder.byte_fallback(of_kind(Kind::Byte).is_some());
    if let Some(unknown) = of_kind(Kind::Unknown) {
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut inner = Inner::new(builder.build().map_err(|error| anyhow::anyhow!("metadata `{TOKENS}`: {error}"))?);

    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| Replace::new(from.to_owned(), to).map_err(|error| anyhow::anyhow!("{error}"));
    let mut normalizers = vec![NormalizerWrapper::Replace(replace(" ", "\u{2581}")?)];
    let mut decoders: Vec<DecoderWrapper> =
        vec![replace("\u{2581}", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        normalizers.insert(0, Prepend::new("\u{2581}".to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(|error| anyhow::anyhow!("{error}"))?;
    inner.with_decoder(Some(Sequence::new(decoders)));
    Ok(inner)
}

/// Lists the merges that scores mean: whatever two tokens make a third one, best third one first. The order among the halves of
/// one token is that of their ids, as in Hugging Face's converter (`generate_merges`).
fn merges(vocabulary: &Vocabulary<'_>, scores: Array<'_>) -> anyhow::Result<Vec<(String, String)>> {
    let (found, expected) = (scores.len(), vocabulary.len());
    ensure!(found == expected, "metadata `{SCORES}` has {found} entries for {expected} tokens");
    let ids = vocabulary.ids()?;
    let mut merges = Vec::new();
    for (id, (&(text, kind), score)) in vocabulary.tokens.iter().zip(scores).enumerate() {
        let score = score.as_number().filter(|score| !score.is_nan());
        let score = score.with_context(|| format!("metadata `{SCORES}`: entry {id} is not a number"))?;
        if kind != Kind::Normal {
            continue;
        }
        let length = text.len();
        ensure!(
            length <= MAX_PIECE_BYTES,
            "metadata `{TOKENS}`: token {id} has {length} bytes, known are {MAX_PIECE_BYTES}"
        );
        for (cut, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                merges.push((score, left_id, right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

fn bpe(vocabulary: &Vocabulary<'_>, merges: Vec<(String, String)>) -> anyhow::Result<BpeBuilder> {
    let vocab: Vocab = vocabulary.ids()?.into_iter().map(|(text, id)| (text.to_owned(), id)).collect();
    Ok(BPE::builder().vocab_and_merges(vocab, merges))
}
