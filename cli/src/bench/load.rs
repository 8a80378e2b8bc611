//! `baton bench --url`: load on any OpenAI endpoint.
//!
//! [`plan`] says what is sent and when, [`play`] sends it, [`report`] and [`page`] write what came back. In an open loop requests are sent
//! when they are due, however slow the answers are, and latencies count from when a request was *due*: an endpoint that stalls is
//! measured while it stalls. How late the requests really left is reported as well, so that a sender that is too slow shows.

mod endpoint;
mod exchange;
mod page;
mod plan;
mod play;
mod plot;
mod progress;
mod report;
#[cfg(test)]
mod tests;

use crate::settings::Load;
use anyhow::Context;
use endpoint::Endpoint;
use plan::Plan;
use report::Report;
use std::{path::Path, sync::Arc, time::Duration};

/// Sends what `load` asks for to `url` and reports.
pub(super) fn run(url: &str, load: &Load) -> anyhow::Result<()> {
    let plan = Plan::new(load)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let report = runtime.block_on(measure(url, load, plan))?;
    // What is still in flight after an interrupt is nobody's concern any more.
    runtime.shutdown_timeout(Duration::from_millis(100));
    print!("{}", report.table());
    if let Some(path) = &load.json {
        let json = serde_json::to_string(&report).context("write the figures")?;
        write(path, &json)?;
    }
    if let Some(path) = &load.html {
        write(path, &page::html(&report))?;
    }
    Ok(())
}

async fn measure(url: &str, load: &Load, plan: Plan) -> anyhow::Result<Report> {
    let endpoint = Endpoint::reach(url, load).await?;
    println!("{}", plan.description);
    println!("{} at {url}, {}\n", endpoint.model(), endpoint.form());
    let about = report::About {
        endpoint: url.to_owned(),
        model: endpoint.model().to_owned(),
        load: plan.description.clone(),
        prompts: endpoint.form().to_string(),
    };
    let interrupt = async {
        // Without a handler for it, an interrupt ends the process, which is as good.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let played = play::play(Arc::new(endpoint), plan, interrupt).await;
    Ok(Report::new(about, played, plan::objectives(load)))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}
