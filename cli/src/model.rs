//! Which model is served: found, named and loaded.

use crate::settings::ModelChoice;
use anyhow::{Context, bail};
use engine::{LoadProgress, Model};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// A model directory and the name its clients use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    /// Holds `config.json`, weights and tokenizer.
    pub(crate) dir: PathBuf,
    /// What clients ask for.
    pub(crate) name: String,
}

/// Where a bundled model may lie when none is named, best first: beside an installed binary, in the system, in the source
/// tree this binary was built from.
fn bundled() -> Vec<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("../share/baton/models/demo")));
    let system = PathBuf::from("/usr/share/baton/models/demo");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    beside.into_iter().chain([system, source]).collect()
}

/// Finds the model: the one named, or the bundled one.
///
/// # Errors
/// Names the directory that is missing or incomplete, or everywhere it looked.
pub(crate) fn locate(choice: &ModelChoice) -> anyhow::Result<Located> {
    let dir = match &choice.model {
        Some(dir) => checked(dir)?,
        None => first_of(&bundled())?,
    };
    let name = match &choice.model_name {
        Some(name) => name.clone(),
        None => name_of(&dir)?,
    };
    Ok(Located { dir, name })
}

fn checked(dir: &Path) -> anyhow::Result<PathBuf> {
    const EXPECTED: &str = "expected a Hugging Face model directory with config.json and *.safetensors";
    if !dir.exists() {
        bail!("--model {}: no such directory; {EXPECTED}", dir.display());
    }
    if !dir.is_dir() {
        bail!("--model {}: not a directory; {EXPECTED}", dir.display());
    }
    if !dir.join("config.json").is_file() {
        bail!("--model {}: it holds no config.json; {EXPECTED}", dir.display());
    }
    Ok(dir.to_owned())
}

fn first_of(places: &[PathBuf]) -> anyhow::Result<PathBuf> {
    match places.iter().find(|dir| dir.join("config.json").is_file()) {
        Some(dir) => Ok(dir.canonicalize().unwrap_or_else(|_| dir.clone())),
        None => {
            let looked: Vec<_> = places.iter().map(|dir| format!("  {}", dir.display())).collect();
            bail!("no bundled model; give one by --model DIR (or BATON_MODEL). Looked in\n{}", looked.join("\n"))
        }
    }
}

/// Returns the directory's own name, also of `.` and of links.
fn name_of(dir: &Path) -> anyhow::Result<String> {
    let full = dir.canonicalize().with_context(|| format!("--model {}", dir.display()))?;
    let name = full.file_name().context("--model: the root directory has no name; give --model-name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Returns how many cores this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Loads the weights, showing how far that is: a bar on a terminal, a line of the log otherwise.
pub(crate) async fn load(located: &Located) -> anyhow::Result<Arc<Model>> {
    let dir = located.dir.clone();
    let began = Instant::now();
    tracing::info!(model = %located.name, dir = %dir.display(), "loading weights");
    let load = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new();
        Model::load(&dir, &mut |done| progress.show(done))
    });
    let model = load.await.context("load the model")??;
    let info = model.info();
    tracing::info!(
        model = %located.name,
        architecture = %info.architecture,
        parameters = info.parameters,
        dtype = %info.dtype,
        fingerprint = %info.fingerprint,
        seconds = began.elapsed().as_secs_f64(),
        "weights loaded"
    );
    Ok(model)
}

/// Shows how far loading is, until dropped.
struct Progress {
    bar: ProgressBar,
    terminal: bool,
    told: Instant,
}

/// How often the log hears of it.
const TELL_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    fn new() -> Self {
        let terminal = io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style =
            ProgressStyle::with_template("loading weights {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
        bar.set_style(style.expect("the template is well formed"));
        Self { bar, terminal, told: Instant::now() }
    }

    fn show(&mut self, progress: LoadProgress) {
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
        if !self.terminal && self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            tracing::info!(done_bytes = progress.done, total_bytes = progress.total, "loading weights");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(model: Option<&Path>, name: Option<&str>) -> ModelChoice {
        ModelChoice { model: model.map(Path::to_owned), model_name: name.map(str::to_owned) }
    }

    #[test]
    fn the_source_tree_carries_a_model() {
        let located = locate(&choice(None, None)).expect("the bundled model");
        assert_eq!(located.name, "demo");
        assert!(located.dir.join("tokenizer.json").is_file());
        let renamed = locate(&choice(Some(&located.dir), Some("other"))).expect("the same directory by name");
        assert_eq!(renamed, Located { dir: located.dir, name: "other".into() });
    }

    #[test]
    fn a_missing_model_is_named() {
        let empty = tempfile::tempdir().expect("a temporary directory");
        let gone = empty.path().join("gone");
        for (dir, problem) in [(gone.as_path(), "no such directory"), (empty.path(), "holds no config.json")] {
            let message = locate(&choice(Some(dir), None)).expect_err("no model there").to_string();
            assert!(message.contains(problem) && message.contains(&dir.display().to_string()), "{message}");
        }
        let message = first_of(std::slice::from_ref(&gone)).expect_err("no model there").to_string();
        assert!(message.contains("--model") && message.contains(&gone.display().to_string()), "{message}");
    }
}
