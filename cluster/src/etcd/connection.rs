//! Clients, time limits, waiting between attempts, and what the log says about an outage.

use super::EtcdConfig;
use etcd_client::{Client, ConnectOptions};
use rand::Rng;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Limit for connecting, and for each call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait after the first failure; it doubles from there.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait: short, since everybody is to be back within five seconds of etcd, and an attempt costs etcd next to nothing.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// A session that lasted so long was a good one: the next failure starts with the shortest wait.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// Why a session with etcd ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Nothing came within the limit.
    #[error("{0}: no answer within {CALL_TIMEOUT:?}")]
    Timeout(&'static str),
    /// etcd, or the way to it, refused.
    #[error("{0}: {1}")]
    Etcd(&'static str, #[source] etcd_client::Error),
    /// A stream ended.
    #[error("{0}: the stream ended")]
    Closed(&'static str),
    /// Nobody reachable listens at any endpoint.
    #[error("{0}")]
    Unreachable(String),
}

/// Makes clients of one etcd.
#[derive(Debug)]
pub(super) struct Connector {
    pub(super) config: EtcdConfig,
}

impl Connector {
    pub(super) fn new(config: EtcdConfig) -> Self {
        Self { config }
    }

    /// Key under which the members lie, with its closing slash.
    pub(super) fn prefix(&self) -> String {
        format!("/baton/{}/members/", self.config.cluster)
    }

    /// Key of one member.
    pub(super) fn key(&self, id: &str) -> String {
        format!("/baton/{}/members/{id}", self.config.cluster)
    }

    /// Returns a new client once some endpoint accepts connections.
    ///
    /// The probe is there because a client connects in the background: without it, a refused connection would show as a call
    /// that times out, which takes longer to notice and says less.
    pub(super) async fn client(&self) -> Result<Client, Failure> {
        let mut problems = Vec::new();
        for endpoint in &self.config.endpoints {
            match probe(endpoint).await {
                Ok(()) => return self.build().await,
                Err(problem) => problems.push(format!("{endpoint}: {problem}")),
            }
        }
        Err(Failure::Unreachable(problems.join("; ")))
    }

    async fn build(&self) -> Result<Client, Failure> {
        // An etcd that has lost its leader would let a watch hang in silence: ask for an error instead.
        let options = ConnectOptions::new().with_connect_timeout(CALL_TIMEOUT).with_require_leader(true);
        limited("connect", Client::connect(&self.config.endpoints, Some(options))).await
    }
}

async fn probe(endpoint: &str) -> Result<(), String> {
    let authority = endpoint.trim_start_matches("http://").trim_end_matches('/');
    match timeout(CALL_TIMEOUT, tokio::net::TcpStream::connect(authority)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
    }
}

/// Awaits a call of etcd for at most [`CALL_TIMEOUT`]. `what` names it in the failure.
pub(super) async fn limited<T>(
    what: &'static str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, Failure> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(result) => result.map_err(|error| Failure::Etcd(what, error)),
        Err(_) => Err(Failure::Timeout(what)),
    }
}

/// Waits between sessions and tells the log about outages: one line when one begins, further ones at growing intervals, one
/// when it is over.
#[derive(Debug)]
pub(super) struct Patience {
    /// What suffers, for the log: "watching the members", "the registration of p0".
    what: String,
    outage: Outage,
    next_wait: Duration,
    session_began: Instant,
}

impl Patience {
    pub(super) fn new(what: String) -> Self {
        Self { what, outage: Outage::default(), next_wait: FIRST_WAIT, session_began: Instant::now() }
    }

    /// The session works.
    pub(super) fn works(&mut self) {
        let now = Instant::now();
        self.session_began = now;
        if let Some(lasted) = self.outage.over(now) {
            tracing::info!(outage_seconds = lasted.as_secs_f64(), "etcd is back, {} goes on", self.what);
        }
    }

    /// The session failed: logs and waits before the next one. Cancel-safe.
    pub(super) async fn failed(&mut self, failure: &Failure) {
        let now = Instant::now();
        if self.outage.failed(now) {
            let lasted = self.outage.lasted(now).as_secs();
            tracing::warn!(outage_seconds = lasted, "etcd cannot be used, {} waits for it: {failure}", self.what);
        }
        if now - self.session_began > GOOD_SESSION {
            self.next_wait = FIRST_WAIT;
        }
        // Spread, so that a fleet does not come back in step.
        let spread = rand::rng().random_range(0.5..1.0);
        let wait = self.next_wait.mul_f64(spread);
        self.next_wait = (self.next_wait * 2).min(LONGEST_WAIT);
        sleep(wait).await;
        self.session_began = Instant::now();
    }
}

/// When to say what about an outage. Pure: time is an argument.
#[derive(Debug, Default)]
struct Outage {
    began: Option<Instant>,
    lines: u32,
    next_line: Option<Instant>,
}

impl Outage {
    const FIRST_INTERVAL: Duration = Duration::from_secs(10);
    const LONGEST_INTERVAL: Duration = Duration::from_secs(300);

    /// Notes a failure and says whether it deserves a line: the first, and then after 10, 20, 40, … and every 300 seconds.
    fn failed(&mut self, now: Instant) -> bool {
        self.began.get_or_insert(now);
        if self.next_line.is_some_and(|at| now < at) {
            return false;
        }
        let interval = Self::FIRST_INTERVAL * 2u32.saturating_pow(self.lines.min(16));
        self.lines += 1;
        self.next_line = Some(now + interval.min(Self::LONGEST_INTERVAL));
        true
    }

    /// How long it has lasted.
    fn lasted(&self, now: Instant) -> Duration {
        self.began.map_or(Duration::ZERO, |began| now - began)
    }

    /// Ends it and returns how long it lasted, if there was one.
    fn over(&mut self, now: Instant) -> Option<Duration> {
        let began = std::mem::take(self).began?;
        Some(now - began)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_and_then_ever_more_rarely() {
        let mut outage = Outage::default();
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        assert_eq!(outage.over(start), None);
        let told: Vec<u64> = (0..1500).filter(|second| outage.failed(at(*second))).collect();
        assert_eq!(told, [0, 10, 30, 70, 150, 310, 610, 910, 1210]);
        assert_eq!(outage.lasted(at(1500)), Duration::from_secs(1500));
        assert_eq!(outage.over(at(1500)), Some(Duration::from_secs(1500)));
        assert_eq!(outage.over(at(1501)), None);
        assert!(outage.failed(at(1502)), "the next outage begins with a line");
    }

    #[tokio::test(start_paused = true)]
    async fn waits_grow_but_stay_short() {
        let mut patience = Patience::new("a test".into());
        let mut waits = Vec::new();
        for _ in 0..8 {
            let before = Instant::now();
            patience.failed(&Failure::Closed("watch")).await;
            waits.push(before.elapsed());
        }
        assert!(waits[0] <= FIRST_WAIT, "{waits:?}");
        assert!(waits[5..].iter().all(|wait| (LONGEST_WAIT / 2..=LONGEST_WAIT).contains(wait)), "{waits:?}");
    }

    #[tokio::test]
    async fn a_refused_connection_says_so() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        drop(listener);
        let connector = Connector::new(EtcdConfig::new(vec![endpoint.clone()], "baton"));
        let failure = connector.client().await.err().expect("nobody listens").to_string();
        assert!(failure.starts_with(&endpoint) && failure.contains("refused"), "{failure}");
    }
}
