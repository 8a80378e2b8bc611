//! All workers forgetting their prefix caches.

use super::{Fleet, adapters::unavailable};
use crate::error::Error;
use futures::future::join_all;
use std::time::Duration;
use tokio::time::timeout;

impl Fleet {
    /// Asks all attached workers to forget their prefixes and waits for their answers for at most `limit`. Says whether all did: one
    /// that has a sequence under way, or keeps pages for a peer, does not.
    pub(crate) async fn forget_prefixes(&self, limit: Duration) -> Result<bool, Error> {
        let attached = self.workers().into_iter().filter_map(|worker| {
            let session = worker.state().attached.as_ref()?.session.clone();
            Some((worker.id.clone(), session))
        });
        let ask = attached.map(async |(worker, session)| match timeout(limit, session.reset()).await {
            Ok(Some(done)) => Ok(done),
            Ok(None) => Err(unavailable(format!("worker {worker}: its stream ended before its answer"))),
            Err(_) => Err(unavailable(format!("worker {worker}: no answer within {limit:?}"))),
        });
        let answers = join_all(ask).await;
        if answers.is_empty() {
            return Err(unavailable("no worker is attached".into()));
        }
        answers.into_iter().try_fold(true, |all, done| Ok(all & done?))
    }
}
