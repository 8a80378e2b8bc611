//! `baton chat`: a conversation in the terminal, over the same HTTP endpoint that every client uses.
//!
//! With a terminal, lines are edited and remembered and Ctrl-C stops an answer; with a pipe, every line is a turn and only the
//! answers are printed.

mod client;
mod command;

use crate::settings::Chat as Settings;
use anyhow::Context;
use client::{Client, Piece};
use command::Input;
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::{Value, json};
use std::{
    io::{self, BufRead, IsTerminal, Write},
    time::Instant,
};

/// Talks until the input ends.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let client = Client::new(&settings.url)?;
    let model = match &settings.model {
        Some(model) => model.clone(),
        None => runtime.block_on(client.first_model())?,
    };
    let interactive = io::stdin().is_terminal();
    let mut session =
        Session { client, settings, model, system: settings.system.clone(), turns: Vec::new(), interactive };
    if interactive {
        println!("Talking to {} at {}. /help lists the commands, Ctrl-D leaves.", session.model, settings.url);
    }
    let mut lines = Lines::new(interactive)?;
    while let Some(line) = lines.next()? {
        match Input::read(&line) {
            Input::Nothing => {}
            Input::Say(text) => session.turn(&runtime, text)?,
            Input::Help => println!("{}", command::HELP),
            Input::Clear => session.turns.clear(),
            Input::System(text) => session.set_system(text),
            Input::Unknown(command) => println!("{command}: no such command; /help lists them"),
            Input::Quit => break,
        }
    }
    Ok(())
}

/// Where lines come from.
enum Lines {
    Terminal(Box<DefaultEditor>),
    Pipe(io::Lines<io::StdinLock<'static>>),
}

impl Lines {
    fn new(interactive: bool) -> anyhow::Result<Self> {
        if interactive {
            Ok(Self::Terminal(Box::new(DefaultEditor::new().context("open the terminal")?)))
        } else {
            Ok(Self::Pipe(io::stdin().lock().lines()))
        }
    }

    /// Returns the next line, `None` at the end of input.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Pipe(lines) => Ok(lines.next().transpose().context("read stdin")?),
            Self::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(&line).context("remember a line")?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => println!("(Ctrl-D leaves)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(problem) => return Err(problem).context("read the terminal"),
                }
            },
        }
    }
}

struct Session<'a> {
    client: Client,
    settings: &'a Settings,
    model: String,
    system: Option<String>,
    /// User and assistant messages, alternating.
    turns: Vec<Value>,
    interactive: bool,
}

impl Session<'_> {
    /// Says `text` and prints the answer. On a terminal a failure is shown and forgotten; in a pipe it ends the run.
    fn turn(&mut self, runtime: &tokio::runtime::Runtime, text: String) -> anyhow::Result<()> {
        self.turns.push(json!({"role": "user", "content": text}));
        match runtime.block_on(self.answer()) {
            Ok(answer) => {
                self.turns.push(json!({"role": "assistant", "content": answer}));
                Ok(())
            }
            Err(problem) if self.interactive => {
                self.turns.pop();
                println!("error: {problem:#}");
                Ok(())
            }
            Err(problem) => Err(problem),
        }
    }

    async fn answer(&self) -> anyhow::Result<String> {
        let started = Instant::now();
        let mut answer = self.client.ask(&self.request()).await?;
        let mut shown = Shown::default();
        loop {
            tokio::select! {
                // Cancel safe: `next` keeps what it has read in `answer`, and dropping that ends the request.
                piece = answer.next() => match piece? {
                    Some(piece) => shown.piece(piece, started)?,
                    None => break,
                },
                _ = tokio::signal::ctrl_c(), if self.interactive => {
                    print!(" …stopped");
                    break;
                }
            }
        }
        println!();
        if self.interactive && io::stdout().is_terminal() {
            println!("\x1b[2m{}\x1b[0m", shown.rate(started));
        }
        Ok(shown.text)
    }

    fn request(&self) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let mut request = json!({
            "model": self.model,
            "messages": system.chain(self.turns.iter().cloned()).collect::<Vec<_>>(),
            "temperature": self.settings.temperature,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(max_tokens) = self.settings.max_tokens {
            request["max_tokens"] = max_tokens.into();
        }
        request
    }

    fn set_system(&mut self, text: Option<String>) {
        match text {
            Some(text) => {
                self.system = Some(text);
                self.turns.clear();
                println!("The conversation starts anew under this system message.");
            }
            None => {
                println!("{}", self.system.as_deref().unwrap_or("No system message is set; /system TEXT sets one."))
            }
        }
    }
}

/// What of an answer has been printed.
#[derive(Default)]
struct Shown {
    text: String,
    tokens: u64,
    first_ms: f64,
}

impl Shown {
    fn piece(&mut self, piece: Piece, started: Instant) -> anyhow::Result<()> {
        match piece {
            Piece::Text(text) => {
                if self.text.is_empty() {
                    self.first_ms = started.elapsed().as_secs_f64() * 1e3;
                }
                print!("{text}");
                io::stdout().flush().context("print the answer")?;
                self.text.push_str(&text);
                self.tokens += 1;
            }
            Piece::Usage { completion_tokens } => self.tokens = completion_tokens,
        }
        Ok(())
    }

    fn rate(&self, started: Instant) -> String {
        let seconds = started.elapsed().as_secs_f64();
        let rate = self.tokens as f64 / seconds.max(1e-6);
        format!("{} tokens in {seconds:.2} s, {rate:.0} tok/s, the first after {:.0} ms", self.tokens, self.first_ms)
    }
}
