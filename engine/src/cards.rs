//! NVIDIA's cards as a person or a dashboard wants to know them: which there are, what is missing to use them, and what they are doing.

use serde::Serialize;

/// What there is to compute on cards with; what is missing says why.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// The newest CUDA that the driver knows.
    pub driver: Part,
    /// Cards, by name.
    pub cards: Vec<String>,
    /// The compiler of kernels.
    pub nvrtc: Part,
    /// What connects cards that share a model.
    pub nccl: Part,
    /// What multiplies where bits may depend on the batch.
    pub cublaslt: Part,
    /// What tells what cards are doing.
    pub nvml: Part,
}

/// Which version or library was found, or why none can be used.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// There is one.
    Found(String),
    /// There is none that could be used.
    Missing(String),
}

impl From<Result<String, String>> for Part {
    fn from(found: Result<String, String>) -> Self {
        found.map_or_else(Self::Missing, Self::Found)
    }
}

/// What a card is doing.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Its name in settings: `cuda:0`.
    pub card: String,
    /// Bytes of its memory, and those in use by whomever.
    pub memory: Option<(u64, u64)>,
    /// The share of the last moments, up to a second, in which a kernel ran.
    pub utilization: Option<f64>,
    /// Watts.
    pub power: Option<f64>,
    /// Degrees Celsius.
    pub temperature: Option<f64>,
}

#[cfg(feature = "cuda")]
mod nvidia {
    use super::{Part, Reading, Survey};
    use crate::{Config, Engine, cuda};
    use nvml_wrapper::{Nvml, enum_wrappers::device::TemperatureSensor, error::NvmlError};

    /// Looks for cards and what they take, in the libraries that `config` names or where the system has them.
    pub fn survey(config: &Config) -> Option<Survey> {
        let (driver, cards) = match cuda::survey() {
            Ok((version, cards)) => (Part::Found(version), cards),
            Err(problem) => (Part::Missing(problem), Vec::new()),
        };
        let nvml = Nvml::init().and_then(|nvml| nvml.sys_nvml_version()).map_err(|error| describe(&error));
        Some(Survey {
            driver,
            cards,
            nvrtc: cuda::find_nvrtc(config.nvrtc_library.as_deref()).into(),
            nccl: cuda::find_nccl(config.nccl_library.as_deref()).into(),
            cublaslt: cuda::find_cublaslt(config.cublaslt_library.as_deref()).into(),
            nvml: nvml.into(),
        })
    }

    /// Says what is wrong; what stands behind it, too.
    fn describe(error: &NvmlError) -> String {
        match error {
            NvmlError::LibloadingError(error) => cuda::describe_library(error),
            other => other.to_string(),
        }
    }

    /// Follows the cards of an engine, by NVIDIA's management library.
    #[derive(Debug)]
    pub struct Watch {
        nvml: Nvml,
        /// Their names in settings, and what the library calls them.
        cards: Vec<(String, [String; 2])>,
    }

    impl Watch {
        /// Opens the library for the cards of `engine`; `None` where it has none.
        ///
        /// # Errors
        /// Says why the library cannot be used.
        pub fn open(engine: &Engine) -> Result<Option<Self>, String> {
            let name = |(card, uuid): (String, [u8; 16])| {
                let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
                let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
                // A part of a card (MIG) is one of its own.
                (card, ["GPU", "MIG"].map(|kind| format!("{kind}-{parts}")))
            };
            let cards: Vec<_> = engine.cards().into_iter().map(name).collect();
            if cards.is_empty() {
                return Ok(None);
            }
            let nvml = Nvml::init().map_err(|error| describe(&error))?;
            Ok(Some(Self { nvml, cards }))
        }

        /// Returns what each card is doing, as far as it says.
        pub fn read(&self) -> Vec<Reading> {
            let read = |(card, names): &(String, [String; 2])| {
                let device = names.iter().find_map(|name| self.nvml.device_by_uuid(name.as_str()).ok())?;
                let memory = device.memory_info().ok().map(|memory| (memory.total, memory.used));
                let utilization = device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0);
                let power = device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3);
                let temperature = device.temperature(TemperatureSensor::Gpu).ok().map(f64::from);
                Some(Reading { card: card.clone(), memory, utilization, power, temperature })
            };
            self.cards.iter().filter_map(read).collect()
        }
    }
}

#[cfg(feature = "cuda")]
pub use nvidia::{Watch, survey};

/// Of a binary that knows no cards.
#[cfg(not(feature = "cuda"))]
mod none {
    use super::{Reading, Survey};
    use crate::{Config, Engine};

    /// Finds nothing.
    pub fn survey(_: &Config) -> Option<Survey> {
        None
    }

    /// Follows nothing.
    #[derive(Debug)]
    pub struct Watch(std::convert::Infallible);

    impl Watch {
        /// An engine of this binary has no cards.
        ///
        /// # Errors
        /// None.
        pub fn open(_: &Engine) -> Result<Option<Self>, String> {
            Ok(None)
        }

        /// Returns nothing.
        pub fn read(&self) -> Vec<Reading> {
            match self.0 {}
        }
    }
}

#[cfg(not(feature = "cuda"))]
pub use none::{Watch, survey};
