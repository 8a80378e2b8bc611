//! Which model is served: found, named and loaded.

use crate::settings::{ModelChoice, Quantize};
use anyhow::{Context, bail};
use engine::{LoadProgress, Model};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// A model and the name its clients use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    /// A directory with `config.json`, weights and tokenizer, or a GGUF file.
    pub(crate) path: PathBuf,
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
/// Names the directory or file that is missing or incomplete, or everywhere it looked.
pub(crate) fn locate(choice: &ModelChoice) -> anyhow::Result<Located> {
    let path = match &choice.model {
        Some(path) => checked("--model", path)?,
        None => first_of(&bundled())?,
    };
    let name = match &choice.model_name {
        Some(name) => name.clone(),
        None => name_of(choice.model.as_deref().unwrap_or(&path))?,
    };
    Ok(Located { path, name })
}

/// Finds the model that guesses for `located`: the one named, or for the bundled model the one bundled with it.
///
/// # Errors
/// Names the directory or file that is missing or incomplete, or the flag that is.
pub(crate) fn locate_draft(named: Option<&Path>, located: &Located) -> anyhow::Result<Located> {
    let path = match named {
        Some(path) => checked("--draft-model", path)?,
        None => {
            let full = located.path.canonicalize().unwrap_or_else(|_| located.path.clone());
            let beside = full.with_file_name("demo-draft");
            if !bundled().iter().any(|dir| dir.canonicalize().is_ok_and(|dir| dir == full)) || !beside.is_dir() {
                bail!(
                    "--speculate draft needs --draft-model DIR (or BATON_DRAFT_MODEL): a small model with the vocabulary of {}",
                    located.name
                );
            }
            beside
        }
    };
    let name = name_of(&path)?;
    Ok(Located { path, name })
}

/// Returns the directory or file to load: of a directory that holds nothing but a GGUF file, that file.
fn checked(flag: &str, path: &Path) -> anyhow::Result<PathBuf> {
    const EXPECTED: &str = "expected a GGUF file, or a Hugging Face model directory with config.json and *.safetensors";
    let shown = path.display();
    if !path.exists() {
        bail!("{flag} {shown}: no such directory or file; {EXPECTED}");
    }
    if path.is_file() {
        // Other single files that people may have: weights without the files that belong to them.
        if !is_gguf(path) {
            bail!("{flag} {shown}: not a directory and not a .gguf file; {EXPECTED}");
        }
        return Ok(path.to_owned());
    }
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("{flag} {shown}"))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> = files.filter(|path| path.is_file() && is_gguf(path)).collect();
    match (files.pop(), files.len()) {
        (None, _) => bail!("{flag} {shown}: it holds no config.json and no .gguf file; {EXPECTED}"),
        (Some(file), 0) => Ok(file),
        (Some(_), others) => bail!("{flag} {shown}: it holds {} .gguf files; name one of them", others + 1),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
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

/// Returns the directory's own name, also of `.` and of links; of a GGUF file, the name without the ending.
fn name_of(path: &Path) -> anyhow::Result<String> {
    let full = path.canonicalize().with_context(|| format!("--model {}", path.display()))?;
    let name = if full.is_file() { path.file_stem() } else { full.file_name() };
    let name = name.context("--model: the root directory has no name; give --model-name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Returns how many cores this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Loads the weights, quantised if asked for, showing how far that is: a bar on a terminal, a line of the log otherwise.
pub(crate) async fn load(located: &Located, quantize: Option<Quantize>) -> anyhow::Result<Arc<Model>> {
    let path = located.path.clone();
    let began = Instant::now();
    tracing::info!(model = %located.name, path = %path.display(), "loading weights");
    let load = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new();
        Model::load_quantized(&path, quantize.map(Into::into), &mut |done| progress.show(done))
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
        assert!(located.path.join("tokenizer.json").is_file());
        let renamed = locate(&choice(Some(&located.path), Some("other"))).expect("the same directory by name");
        assert_eq!(renamed, Located { path: located.path, name: "other".into() });
    }

    #[test]
    fn a_gguf_file_is_a_model_and_so_is_a_directory_with_one() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let model = dir.path().join("model");
        std::fs::create_dir(&model).expect("a directory");
        let file = model.join("tiny-Q4_K_M.gguf");
        std::fs::write(&file, "").expect("a file");
        let named = locate(&choice(Some(&file), None)).expect("a file");
        assert_eq!(named, Located { path: file.clone(), name: "tiny-Q4_K_M".into() });
        let found = locate(&choice(Some(&model), None)).expect("the only file");
        assert_eq!(found, Located { path: file, name: "model".into() });
        std::fs::write(model.join("other.gguf"), "").expect("a file");
        let message = locate(&choice(Some(&model), None)).expect_err("two files").to_string();
        assert!(message.contains("2 .gguf files"), "{message}");
    }

    #[test]
    fn the_bundled_model_has_a_draft_and_others_need_one_named() {
        let located = locate(&choice(None, None)).expect("the bundled model");
        let draft = locate_draft(None, &located).expect("the bundled draft model");
        assert_eq!(draft.name, "demo-draft");
        assert_eq!(locate_draft(Some(&draft.path), &draft).expect("named"), draft);
        let message = locate_draft(None, &draft).expect_err("not the bundled model").to_string();
        assert!(message.contains("--draft-model"), "{message}");
        let message = locate_draft(Some(Path::new("/nowhere")), &located).expect_err("no such model").to_string();
        assert!(message.contains("--draft-model /nowhere"), "{message}");
    }

    #[test]
    fn a_missing_model_is_named() {
        let empty = tempfile::tempdir().expect("a temporary directory");
        let gone = empty.path().join("gone");
        let other = empty.path().join("model.bin");
        std::fs::create_dir(empty.path().join("empty")).expect("a directory");
        std::fs::write(&other, "").expect("a file");
        for (dir, problem) in [
            (gone.as_path(), "no such directory"),
            (&empty.path().join("empty"), "holds no config.json"),
            (&other, "not a .gguf file"),
        ] {
            let message = locate(&choice(Some(dir), None)).expect_err("no model there").to_string();
            assert!(message.contains(problem) && message.contains(&dir.display().to_string()), "{message}");
        }
        let message = first_of(std::slice::from_ref(&gone)).expect_err("no model there").to_string();
        assert!(message.contains("--model") && message.contains(&gone.display().to_string()), "{message}");
    }
}
