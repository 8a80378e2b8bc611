//! A pace with its origin, as a file.

use crate::Pace;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A worker's measured speed. Read from TOML:
///
/// ```toml
/// model = "Llama-2-70B, bf16"
/// machine = "8 x A800-80GB"
/// source = "where the numbers come from"
/// kv_bytes_per_token = 327680
/// kv_tokens = 1300000
///
/// [pace]
/// step_us = 11000
/// sequence_us = 20
/// context_ns = 20
/// token_us = 110
/// pair_ns = 2
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What ran.
    pub model: String,
    /// On what it ran.
    pub machine: String,
    /// Where the numbers come from.
    pub source: String,
    /// Bytes of keys and values of one token, all layers.
    pub kv_bytes_per_token: u64,
    /// Tokens whose keys and values fit beside the model.
    pub kv_tokens: u64,
    /// The numbers.
    pub pace: Pace,
}

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("profile {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no profile.
    #[error("profile {}: {reason}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong, with the field.
        reason: String,
    },
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// [`ProfileError`], which names the file and the field.
    pub fn read(file: &Path) -> Result<Self, ProfileError> {
        let text = std::fs::read_to_string(file).map_err(|source| ProfileError::Read { file: file.into(), source })?;
        Self::parse(&text).map_err(|reason| ProfileError::Content { file: file.into(), reason })
    }

    /// Reads the text of a profile; an error says what is wrong with which field.
    pub fn parse(text: &str) -> Result<Self, String> {
        let profile: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let Pace { step_us, sequence_us, context_ns, token_us, pair_ns } = profile.pace;
        for (field, value, least) in [
            ("pace.step_us", step_us, 0.0),
            ("pace.sequence_us", sequence_us, 0.0),
            ("pace.context_ns", context_ns, 0.0),
            ("pace.token_us", token_us, f64::MIN_POSITIVE),
            ("pace.pair_ns", pair_ns, 0.0),
        ] {
            if !value.is_finite() || value < least {
                let wanted = if least > 0.0 { "above 0" } else { "0 or more" };
                return Err(format!("{field} is {value}; it must be a finite number, {wanted}"));
            }
        }
        for (field, value) in [("kv_bytes_per_token", profile.kv_bytes_per_token), ("kv_tokens", profile.kv_tokens)] {
            if value == 0 {
                return Err(format!("{field} is 0; it must be above 0"));
            }
        }
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        model = "m"
        machine = "x"
        source = "a test"
        kv_bytes_per_token = 100
        kv_tokens = 1000
        [pace]
        step_us = 1
        sequence_us = 2
        context_ns = 3.5
        token_us = 4
        pair_ns = 5
    "#;

    #[test]
    fn a_profile_is_read_and_written() {
        let profile = Profile::parse(GOOD).unwrap();
        assert_eq!(profile.pace.context_ns, 3.5);
        assert_eq!(Profile::parse(&toml::to_string(&profile).unwrap()), Ok(profile));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value() {
        let refused = |from: &str, to: &str| Profile::parse(&GOOD.replace(from, to)).unwrap_err();
        assert_eq!(refused("token_us = 4", "token_us = 0"), "pace.token_us is 0; it must be a finite number, above 0");
        assert_eq!(refused("pair_ns = 5", "pair_ns = -5"), "pace.pair_ns is -5; it must be a finite number, 0 or more");
        assert_eq!(refused("kv_tokens = 1000", "kv_tokens = 0"), "kv_tokens is 0; it must be above 0");
        assert!(refused("step_us = 1", "step = 1").contains("step"));
        let error = Profile::read(Path::new("/nowhere/p.toml")).unwrap_err();
        assert!(error.to_string().starts_with("profile /nowhere/p.toml: "), "{error}");
    }
}
