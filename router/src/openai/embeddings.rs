//! `/v1/embeddings`: one vector for each input.
//!
//! Each input is computed as a prompt is, on the worker that would compute it, and nothing is generated. The vector is pooled from
//! hidden states there, of length 1.

use super::{
    Head, Usage, completions,
    fields::{Fields, wrong},
    params, write_json,
};
use crate::{
    admission::Claim,
    error::Error,
    fleet::{
        adapters::Adapter,
        leg::{Pooling, Sampling, Stop},
    },
    prompt::{Prompt, PromptSource, Truncation},
    request::{Finish, Generation, Origin, Router, Step, Work},
    text::embedding::Shorter,
    why::Arrival,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde_json::Value;
use std::sync::Arc;

/// Most inputs of a request: OpenAI's limit.
const MAX_INPUTS: usize = 2_048;
/// Most inputs of a request that are computed at a time. They fill a worker's steps, and leave room for others.
const AT_ONCE: usize = 32;

/// A request for embeddings that makes sense.
#[derive(Debug)]
pub(crate) struct EmbeddingRequest {
    /// As the client named it, or the default.
    pub(crate) model: String,
    pub(crate) request_id: Option<String>,
    adapter: Option<Arc<Adapter>>,
    inputs: Vec<PromptSource>,
    pooling: Pooling,
    /// Numbers of a vector that are wanted, the first ones; `None` = all.
    dimensions: Option<usize>,
    encoding: Encoding,
    truncation: Option<Truncation>,
    priority: i32,
    salt: Bytes,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug)]
enum Encoding {
    Float,
    /// Of f32 in little-endian order.
    Base64,
}

impl EmbeddingRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let (model, adapter) = params::model(&mut fields, router)?;
        let Some(pooling) = router.pooling else { return Err(cannot_embed(&model)) };
        fields.refuse(&["messages", "embed_dtype", "endianness"])?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(other) => return Err(wrong("encoding_format", "\"float\" or \"base64\"", &other.into())),
        };
        let special = fields.bool("add_special_tokens")?.unwrap_or(true);
        Ok(Self {
            inputs: completions::prompts(&mut fields, ("input", MAX_INPUTS), special, router.model.vocab_size)?,
            dimensions: dimensions(&mut fields, router)?,
            truncation: params::truncation(&mut fields, None)?,
            priority: params::priority(&mut fields)?,
            salt: params::salt(&mut fields)?,
            request_id: params::request_id(&mut fields)?,
            model,
            adapter,
            pooling,
            encoding,
        })
    }

    /// Waits for a turn, has every input computed, and returns the answer's body.
    pub(crate) async fn answer(self, router: Arc<Router>, origin: Origin, head: Head) -> Result<Vec<u8>, Error> {
        let place = router.admission.enter(self.priority)?;
        let (root, kept, inputs) = ((self.salt, self.adapter), (false, self.truncation), self.inputs);
        let prompts = router.prepare(origin.body_bytes, move |_| Ok(inputs), root, kept, "input").await?;
        let claim = Claim {
            class: self.priority,
            key: origin.key_number(),
            tokens: prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum(),
            choices: prompts.len().min(AT_ONCE),
            objective: None,
        };
        let _turn = place.turn(claim, || None).await?;
        let arrival = Arrival { class: self.priority, waited: origin.arrived.elapsed(), objective: None };
        router.why.admitted(&origin.request, arrival);
        let work = |prompt| work(origin.clone(), prompt, self.pooling, self.priority);
        let embedded: Vec<(Vec<f32>, Usage)> = stream::iter(prompts)
            .map(|prompt| embed(router.clone(), work(prompt)))
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let (dimensions, encoding) = (self.dimensions, self.encoding);
        Ok(router.text.run(move || write(&head, embedded, dimensions, encoding)).await)
    }
}

fn cannot_embed(model: &str) -> Error {
    let problem = format!(
        "the model {model:?} does not say how its hidden states make an embedding (modules.json, or pooling_type of a GGUF file); a router \
         started with --embedding-pooling last or mean embeds with it all the same"
    );
    Error::invalid("model", problem)
}

/// Fewer numbers mean something only with a model that was trained for that.
fn dimensions(fields: &mut Fields, router: &Router) -> Result<Option<usize>, Error> {
    let Some(wanted) = fields.integer("dimensions", 1..=i64::from(u32::MAX))? else { return Ok(None) };
    let shape = &router.model.embedding;
    let whole = shape.dimensions.map(i64::from);
    if whole == Some(wanted) {
        return Ok(None);
    }
    let allowed = match &shape.shorter {
        Shorter::No => {
            let whole = whole.map_or("all".into(), |whole| whole.to_string());
            let problem = format!(
                "must be {whole}, got {wanted}: the model's config.json has neither is_matryoshka nor matryoshka_dimensions, so fewer \
                 would be a poor embedding"
            );
            return Err(Error::invalid("dimensions", problem));
        }
        Shorter::Any => whole.is_none_or(|whole| wanted < whole),
        Shorter::These(known) => known.iter().any(|known| i64::from(*known) == wanted),
    };
    if !allowed {
        let expected = match &shape.shorter {
            Shorter::These(known) => format!("one of {known:?}"),
            _ => format!("an integer from 1 to {}", whole.unwrap_or_default()),
        };
        return Err(wrong("dimensions", &expected, &Value::from(wanted)));
    }
    Ok(Some(wanted as usize))
}

fn work(origin: Origin, prompt: Arc<Prompt>, pooling: Pooling, priority: i32) -> Work {
    Work {
        // Without a first token there is no objective for it.
        origin: Origin { objective: None, ..origin },
        prompt,
        sampling: Arc::new(Sampling::greedy()),
        grammar: None,
        choice: 0,
        stop: Arc::new(Stop { max_tokens: 1, min_tokens: 0, ignore_eos: false, token_ids: Vec::new() }),
        stop_strings: Vec::new(),
        include_stop: false,
        skip_special: true,
        shown: Arc::default(),
        report_ids: false,
        prompt_logprobs: None,
        priority,
        pooling: Some(pooling),
        transfer: None,
        promise: None,
        expected: 0,
    }
}

async fn embed(router: Arc<Router>, work: Work) -> Result<(Vec<f32>, Usage), Error> {
    let mut generation = Generation::new(router, work);
    let mut step = Step::default();
    generation.next(&mut step).await?;
    debug_assert_eq!(step.finish, Some(Finish::EndOfSequence), "an embedding is one step");
    let usage = Usage::new(generation.prompt_tokens(), generation.cached_tokens(), 0);
    Ok((step.embedding, usage))
}

#[derive(Serialize)]
struct List<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    data: Vec<Item>,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

fn write(head: &Head, embedded: Vec<(Vec<f32>, Usage)>, dimensions: Option<usize>, encoding: Encoding) -> Vec<u8> {
    let usage = embedded.iter().fold(Usage::default(), |sum, (_, usage)| sum.and(usage));
    let item = |(index, (mut vector, _)): (usize, (Vec<f32>, Usage))| {
        if let Some(dimensions) = dimensions {
            shorten(&mut vector, dimensions);
        }
        let embedding = match encoding {
            Encoding::Float => Vector::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                Vector::Base64(BASE64_STANDARD.encode(bytes))
            }
        };
        Item { object: "embedding", index, embedding }
    };
    let data = embedded.into_iter().enumerate().map(item).collect();
    let list = List { id: &head.id, object: "list", created: head.created, model: &head.model, data, usage };
    let mut out = Vec::new();
    write_json(&list, &mut out);
    out
}

/// Keeps the first numbers, and brings what is left to length 1 again.
fn shorten(vector: &mut Vec<f32>, dimensions: usize) {
    vector.truncate(dimensions);
    let length = vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_vector_has_length_one() {
        let mut vector = vec![3.0, 4.0, 12.0];
        shorten(&mut vector, 2);
        assert_eq!(vector, [0.6, 0.8]);
        let mut nothing = vec![0.0, 0.0, 1.0];
        shorten(&mut nothing, 2);
        assert_eq!(nothing, [0.0, 0.0]);
    }
}
