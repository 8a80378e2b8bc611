//! The TOML file: its keys become defaults of the flags of the same name.

use serde::de::DeserializeOwned;
use std::{
    error::Error as _,
    path::{Path, PathBuf},
};
use toml::{Table, Value};

/// A configuration file, read.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    flags: Vec<(String, Value)>,
    tables: Table,
}

/// Tables of library settings, by name, not yet given a type.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    path: PathBuf,
    tables: Table,
}

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It is not there or not readable.
    #[error("config {path}: {source}")]
    Read {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("config {path}: {problem}")]
    Syntax {
        /// As given.
        path: PathBuf,
        /// Place and reason.
        problem: String,
    },
    /// It names something that this command does not have.
    #[error("config {path}: unknown {what} {name:?}; `baton {command}` knows {known}")]
    Unknown {
        /// As given.
        path: PathBuf,
        /// `setting` or `table`.
        what: &'static str,
        /// What the file says.
        name: String,
        /// The subcommand.
        command: String,
        /// All that it knows.
        known: String,
    },
    /// A value does not fit its setting.
    #[error("config {path}: setting {name} = {value}: {problem}")]
    Value {
        /// As given.
        path: PathBuf,
        /// The setting.
        name: String,
        /// As the file says it.
        value: String,
        /// What would be right.
        problem: String,
    },
}

impl File {
    /// Reads the file and tells settings from tables.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let table: Table = text
            .parse()
            .map_err(|problem: toml::de::Error| Error::Syntax { path: path.into(), problem: problem.to_string() })?;
        let (tables, flags): (Vec<_>, Vec<_>) = table.into_iter().partition(|(_, value)| value.is_table());
        Ok(Self { path: path.into(), flags, tables: tables.into_iter().collect() })
    }

    /// Makes each setting the default of its flag of `command`, after checking it by itself. Returns the parser and the names
    /// that were set.
    pub(super) fn apply(
        &self,
        mut parser: clap::Command,
        command: &str,
    ) -> Result<(clap::Command, Vec<String>), Error> {
        let mut names = Vec::new();
        for (name, value) in &self.flags {
            let id = match self.find(&parser, command, name) {
                // It reads a worker's file, most of which is not about hand-offs.
                Err(_) if command == "doctor" => continue,
                found => found?,
            };
            let text = self.text(name, value)?;
            self.check(&parser, command, name, &text)?;
            let default = |arg: clap::Arg| arg.default_value(text.clone());
            // `up` is also what runs without a subcommand: its flags stand at both places.
            if command == "up" {
                parser = parser.mut_arg(&id, default);
            }
            parser = parser.mut_subcommand(command, |parser| parser.mut_arg(&id, default));
            names.push(name.clone());
        }
        Ok((parser, names))
    }

    /// Keeps the tables once all of their names are among `known`.
    pub(super) fn into_tables(self, known: &[&str], command: &str) -> Result<Tables, Error> {
        match self.tables.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(self.unknown("table", name, command, known.join(", "))),
            None => Ok(Tables { path: self.path, tables: self.tables }),
        }
    }

    /// Returns the id of the flag that is called `name`.
    fn find(&self, parser: &clap::Command, command: &str, name: &str) -> Result<clap::Id, Error> {
        let flags = || {
            let parser = parser.find_subcommand(command).into_iter();
            parser.flat_map(clap::Command::get_arguments).filter(|arg| arg.get_long() != Some("config"))
        };
        let found = flags().find(|arg| arg.get_long() == Some(name)).map(|arg| arg.get_id().clone());
        found.ok_or_else(|| {
            let known: Vec<_> = flags().filter_map(clap::Arg::get_long).collect();
            self.unknown("setting", name, command, known.join(", "))
        })
    }

    /// Writes a TOML value as the flag would be given.
    fn text(&self, name: &str, value: &Value) -> Result<String, Error> {
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => Ok(value.to_string()),
            Value::Array(items) => {
                let items: Result<Vec<_>, _> = items.iter().map(|item| self.text(name, item)).collect();
                Ok(items?.join(","))
            }
            Value::Datetime(_) | Value::Table(_) => {
                Err(self.wrong(name, &value.to_string(), "expected a string, a number or a list"))
            }
        }
    }

    /// Parses a value alone, so that the complaint names this file and not a flag nobody gave.
    fn check(&self, parser: &clap::Command, command: &str, name: &str, text: &str) -> Result<(), Error> {
        let args = ["baton".to_owned(), command.to_owned(), format!("--{name}={text}")];
        parser.clone().try_get_matches_from(args).map(drop).map_err(|error| {
            let problem = match (error.source(), error.get(clap::error::ContextKind::ValidValue)) {
                (Some(source), _) => source.to_string(),
                (None, Some(valid)) => format!("expected one of {valid}"),
                (None, None) => error.kind().to_string(),
            };
            self.wrong(name, &format!("{text:?}"), &problem)
        })
    }

    fn unknown(&self, what: &'static str, name: &str, command: &str, known: String) -> Error {
        Error::Unknown { path: self.path.clone(), what, name: name.into(), command: command.into(), known }
    }

    fn wrong(&self, name: &str, value: &str, problem: &str) -> Error {
        Error::Value { path: self.path.clone(), name: name.into(), value: value.into(), problem: problem.into() }
    }
}

impl Tables {
    /// Returns each table as the file has it, on one line.
    pub(super) fn shown(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.tables.iter().map(|(name, table)| (name.as_str(), table))
    }

    /// Returns the settings of table `name`; without one, the library's defaults.
    ///
    /// # Errors
    /// Names file, table and field, as the library's own `Config` rejects it.
    pub(crate) fn config<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let table = self.tables.get(name).cloned().unwrap_or_else(|| Value::Table(Table::new()));
        table.try_into().map_err(|problem: toml::de::Error| Error::Syntax {
            path: self.path.clone(),
            problem: format!("table [{name}]: {}", problem.to_string().trim_end()),
        })
    }
}
