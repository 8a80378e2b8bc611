//! `/v1/models`.

use crate::{error::Error, fleet::adapters::Adapter, request::Router};
use serde::Serialize;

/// All models: one under one or more names, and what adapters make of it.
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
    permission: [Permission; 1],
}

/// What old clients of OpenAI look for: everybody may do everything that is served.
#[derive(Debug, Serialize)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<()>,
    is_blocking: bool,
}

impl Permission {
    fn new(created: u64) -> Self {
        Self {
            id: format!("modelperm-{created:032x}"),
            object: "model_permission",
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: None,
            is_blocking: false,
        }
    }
}

pub(crate) fn list(router: &Router) -> ModelList {
    let base = router.config.names().map(|name| model(router, name));
    let adapters = router.fleet.adapters();
    let shadowed = |adapter: &Adapter| router.config.names().any(|name| *name == adapter.name);
    let adapted = adapters.iter().filter(|adapter| !shadowed(adapter)).map(|adapter| adapted(router, adapter));
    ModelList { object: "list", data: base.chain(adapted).collect() }
}

pub(crate) fn find(router: &Router, name: &str) -> Result<Model, Error> {
    if let Some(name) = router.config.names().find(|known| *known == name) {
        return Ok(model(router, name));
    }
    let adapter = router.fleet.adapter(name).ok_or_else(|| Error::UnknownModel(name.to_string()))?;
    Ok(adapted(router, &adapter))
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
        permission: [Permission::new(router.created)],
    }
}

fn adapted(router: &Router, adapter: &Adapter) -> Model {
    let parent = Some(router.config.model_name.clone());
    Model { root: adapter.path.clone(), parent, ..model(router, &adapter.name) }
}
