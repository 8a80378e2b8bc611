//! `baton`: the one binary.
//!
//! Reads the settings, starts telemetry and calls the libraries' `run`. Everything else is theirs.
#![forbid(unsafe_code)]

mod bench;
mod chat;
mod config;
mod doctor;
mod engine;
mod listen;
mod model;
mod router;
mod settings;
mod shutdown;
mod simulate;
mod speculation;
mod sse;
mod up;
mod worker;

use anyhow::{Context, anyhow};
use settings::{Command, Common, Settings};
use std::{process::ExitCode, time::Duration};

/// A request is taken apart on one thread and answered on another: glibc's allocator has threads wait for each other then, which costs a router
/// a third of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let settings = match Settings::read(std::env::args_os()) {
        Ok(settings) => settings,
        Err(settings::Error::Usage(usage)) => usage.exit(),
        Err(problem) => {
            eprintln!("error: {problem}");
            return ExitCode::from(2);
        }
    };
    let outcome = match (&settings.command, settings.command.common()) {
        (Command::Chat(chat), _) => chat::run(chat),
        (Command::Doctor(doctor), _) => doctor::run(doctor, &settings.tables),
        (Command::Bench(bench), _) => bench::run(bench),
        (Command::Simulate(simulate), _) => simulate::run(simulate),
        (command, Some(common)) => serve(command, common, &settings),
        (_, None) => unreachable!("every server has common settings"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one of the server processes to its end.
fn serve(command: &Command, common: &Common, settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let outcome = runtime.block_on(async {
        let default_log = if matches!(command, Command::Up(_)) { "warn" } else { "info" };
        let _telemetry = telemetry::init(&config::telemetry(common, default_log), command.name())
            .map_err(|problem| anyhow!("--{}: {}", problem.field, problem.problem))?;
        settings.log();
        let shutdown = shutdown::on_signal()?;
        match command {
            Command::Up(up) => up::run(up, &settings.tables, shutdown).await,
            Command::Router(router) => router::run(router, &settings.tables, shutdown).await,
            Command::PrefillWorker(worker) => {
                worker::run(worker::Role::Prefill, worker, &settings.tables, shutdown).await
            }
            Command::DecodeWorker(decode) => {
                let role = worker::Role::Decode(&decode.speculation);
                worker::run(role, &decode.worker, &settings.tables, shutdown).await
            }
            Command::Chat(_) | Command::Doctor(_) | Command::Bench(_) | Command::Simulate(_) => {
                unreachable!("clients are not served")
            }
        }
    });
    // A load of weights that was interrupted still reads its file: nobody waits for that.
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}
