//! What the worker's cards are doing, as metrics.

use engine::{Engine, cards::Watch};
use metrics::{describe_gauge, gauge};
use std::{sync::Arc, time::Duration};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;

/// How often they are asked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Follows the cards of `engine`, if it has any and NVIDIA's management library is there, until what is returned is dropped.
pub(crate) fn follow(engine: &Engine) -> Option<AbortOnDropHandle<()>> {
    let watch = Watch::open(engine).unwrap_or_else(|problem| {
        tracing::info!(problem, "nobody says what the cards are doing: there are no metrics of them");
        None
    });
    describe();
    Some(AbortOnDropHandle::new(tokio::spawn(report(Arc::new(watch?)))))
}

async fn report(watch: Arc<Watch>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let watch = watch.clone();
        // A driver may take its time.
        let read: JoinHandle<()> = spawn_blocking(move || set(&watch));
        if let Err(problem) = read.await {
            return tracing::error!(%problem, "the cards are not followed any more");
        }
    }
}

fn set(watch: &Watch) {
    for reading in watch.read() {
        let set = |name: &'static str, value: Option<f64>| {
            value.iter().for_each(|value| gauge!(name, "card" => reading.card.clone()).set(*value));
        };
        set("baton_card_memory_bytes", reading.memory.map(|(total, _)| total as f64));
        set("baton_card_memory_used_bytes", reading.memory.map(|(_, used)| used as f64));
        set("baton_card_utilization_ratio", reading.utilization);
        set("baton_card_power_watts", reading.power);
        set("baton_card_temperature_celsius", reading.temperature);
    }
}

fn describe() {
    describe_gauge!("baton_card_memory_bytes", "Memory of a card");
    describe_gauge!("baton_card_memory_used_bytes", "Memory of a card that is in use, by whomever");
    describe_gauge!("baton_card_utilization_ratio", "Share of the last moments in which a kernel ran on a card");
    describe_gauge!("baton_card_power_watts", "What a card takes");
    describe_gauge!("baton_card_temperature_celsius", "How hot a card is");
}
