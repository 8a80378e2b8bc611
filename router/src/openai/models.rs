//! `/v1/models`.

use crate::{error::Error, request::Router};
use serde::Serialize;

/// All models, which is one under one or more names.
#[derive(Debug, Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

/// A model as clients see it.
#[derive(Debug, Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
    permission: Vec<()>,
}

pub(crate) fn list(router: &Router) -> ModelList {
    let names = std::iter::once(&router.config.model_name).chain(&router.config.aliases);
    ModelList { object: "list", data: names.map(|name| model(router, name)).collect() }
}

pub(crate) fn find(router: &Router, name: &str) -> Result<Model, Error> {
    let known = std::iter::once(&router.config.model_name).chain(&router.config.aliases).find(|known| *known == name);
    known.map(|name| model(router, name)).ok_or_else(|| Error::UnknownModel(name.to_string()))
}

fn model(router: &Router, name: &str) -> Model {
    Model {
        id: name.to_string(),
        object: "model",
        created: router.created,
        owned_by: "baton",
        root: router.config.model_name.clone(),
        parent: None,
        max_model_len: router.context_tokens(),
        permission: Vec::new(),
    }
}
