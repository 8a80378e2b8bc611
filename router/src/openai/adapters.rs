//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in vLLM's words.

use super::fields::Fields;
use crate::{error::Error, fleet::adapters::Change, request::Router};

/// Longest name of an adapter.
const MAX_NAME_CHARS: usize = 256;

/// Reads a request to load one.
pub(crate) fn load(mut fields: Fields, router: &Router) -> Result<Change, Error> {
    let name = name(&mut fields)?;
    if router.config.names().any(|known| *known == name) {
        return Err(Error::invalid("lora_name", format_args!("{name:?} is the name of the model")));
    }
    let path = fields.string("lora_path")?.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| Error::invalid("lora_path", "is missing"))?;
    fields.refuse(&["load_inplace", "is_3d_lora_weight"])?;
    Ok(Change::Load { name, path })
}

/// Reads a request to unload one.
pub(crate) fn unload(mut fields: Fields, _router: &Router) -> Result<Change, Error> {
    Ok(Change::Unload { name: name(&mut fields)? })
}

fn name(fields: &mut Fields) -> Result<String, Error> {
    let name = fields.string("lora_name")?.ok_or_else(|| Error::invalid("lora_name", "is missing"))?;
    if name.is_empty() || name.chars().count() > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        let problem = format!("must be 1 to {MAX_NAME_CHARS} characters without control characters");
        return Err(Error::invalid("lora_name", problem));
    }
    Ok(name)
}

/// Says that it is done.
pub(crate) fn done(change: &Change) -> String {
    match change {
        Change::Load { name, .. } => format!("Success: LoRA adapter '{name}' added successfully."),
        Change::Unload { name } => format!("Success: LoRA adapter '{name}' removed successfully."),
    }
}
