//! Rows of results: a table for people, a line of JSON for machines.

use anyhow::{Context, bail};
use serde::Serialize;
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// One result. `name` is a path, `area/what/variant…`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) unit: &'static str,
    /// What the machine or a plain implementation reaches in the same run, in the same unit.
    pub(super) limit: Option<f64>,
    /// `value / limit`.
    pub(super) ratio: Option<f64>,
    /// What makes the limit, where it is the machine, and the probe's figure: `memory at 52.3 GB/s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bound: Option<String>,
}

/// Where results go.
#[derive(Debug)]
pub(super) struct Report {
    only: String,
    path: PathBuf,
    file: BufWriter<File>,
    rows: usize,
}

impl Report {
    /// Starts a report at `path`; only rows whose names begin with `only` are wanted.
    pub(super) fn create(path: &Path, only: &str) -> anyhow::Result<Self> {
        let context = || format!("write {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(context)?;
        }
        let file = BufWriter::new(File::create(path).with_context(context)?);
        println!("{:<44} {:>12} {:<10} {:>12} {:>7}  limited by", "name", "value", "unit", "limit", "ratio");
        Ok(Self { only: only.to_owned(), path: path.to_owned(), file, rows: 0 })
    }

    /// Tells whether some row that begins with `prefix` is wanted.
    pub(super) fn wants(&self, prefix: &str) -> bool {
        prefix.starts_with(&self.only) || self.only.starts_with(prefix)
    }

    /// Adds a row, if it is wanted.
    pub(super) fn row(&mut self, name: &str, value: f64, unit: &'static str, limit: Option<f64>) -> anyhow::Result<()> {
        self.bounded_row(name, value, unit, limit, None)
    }

    /// The same, of a limit that is the machine's.
    pub(super) fn bounded_row(
        &mut self,
        name: &str,
        value: f64,
        unit: &'static str,
        limit: Option<f64>,
        bound: Option<String>,
    ) -> anyhow::Result<()> {
        if !name.starts_with(&self.only) {
            return Ok(());
        }
        let ratio = limit.filter(|limit| *limit > 0.0).map(|limit| value / limit);
        let row = Row { name: name.to_owned(), value, unit, limit, ratio, bound };
        println!("{}", row.line().trim_end());
        let json = serde_json::to_string(&row).context("write a row")?;
        writeln!(self.file, "{json}").with_context(|| format!("write {}", self.path.display()))?;
        self.file.flush().with_context(|| format!("write {}", self.path.display()))?;
        self.rows += 1;
        Ok(())
    }

    /// Closes the report.
    ///
    /// # Errors
    /// When nothing was measured: `--only` names no row.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        if self.rows == 0 {
            bail!(
                "--only {:?}: no row begins with that; the areas are machine, engine, handoff, placement and router",
                self.only
            );
        }
        self.file.flush().with_context(|| format!("write {}", self.path.display()))?;
        println!("\n{} rows in {}", self.rows, self.path.display());
        Ok(())
    }
}

impl Row {
    fn line(&self) -> String {
        let number = |value: f64| match value.abs() {
            size if size >= 1000.0 => format!("{value:.0}"),
            size if size >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.3}"),
        };
        let optional = |value: Option<f64>| value.map(number).unwrap_or_else(|| "-".into());
        format!(
            "{:<44} {:>12} {:<10} {:>12} {:>7}  {}",
            self.name,
            number(self.value),
            self.unit,
            optional(self.limit),
            self.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_else(|| "-".into()),
            self.bound.as_deref().unwrap_or_default()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_prefix_and_written_as_json() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("deep/bench.jsonl");
        let mut report = Report::create(&path, "engine/decode").expect("a report");
        assert!(report.wants("engine/") && report.wants("engine/decode_b1/") && !report.wants("machine/"));
        report.row("engine/decode_b1/x", 3.0, "tok/s", Some(4.0)).expect("a row");
        let bound = Some("memory at 50.0 GB/s".to_owned());
        report.bounded_row("engine/decode_b4/x", 3.0, "tok/s", None, bound).expect("a row");
        report.row("engine/prefill512/x", 1.0, "tok/s", None).expect("a row nobody wants");
        report.finish().expect("a finished report");
        let text = std::fs::read_to_string(&path).expect("the report can be read");
        assert_eq!(
            text,
            "{\"name\":\"engine/decode_b1/x\",\"value\":3.0,\"unit\":\"tok/s\",\"limit\":4.0,\"ratio\":0.75}\n\
             {\"name\":\"engine/decode_b4/x\",\"value\":3.0,\"unit\":\"tok/s\",\"limit\":null,\"ratio\":null,\
             \"bound\":\"memory at 50.0 GB/s\"}\n"
        );
        let nothing = Report::create(&path, "warp").expect("a report").finish().expect_err("no rows").to_string();
        assert!(nothing.contains("warp") && nothing.contains("handoff"), "{nothing}");
    }
}
