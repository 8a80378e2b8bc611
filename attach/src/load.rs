//! What a worker tells routers about its load.

use timing::Pace;

/// Load of a worker, as of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences not yet scheduled.
    pub waiting: usize,
    /// Tokens known and not yet computed, over both.
    pub waiting_tokens: usize,
    /// Pages free or evictable.
    pub pages_free: usize,
    /// Pages in the pool.
    pub pages_total: usize,
    /// Hand-offs in flight.
    pub handoffs: usize,
    /// Legs of all routers that have not ended.
    pub legs: usize,
    /// How fast its steps are; `None` = not known yet.
    pub pace: Option<Pace>,
    /// What computing the prompts it has will take, in milliseconds.
    pub backlog_ms: f64,
    /// Recent, of hand-offs this worker sent; 0 = not known yet.
    pub link_bytes_per_s: f64,
    /// Whether new submissions are refused.
    pub draining: bool,
}

impl Load {
    /// Writes it for a router whose attempts up to `received` it knows of.
    pub(crate) fn encode(&self, received: u64) -> proto::Load {
        let pace = self.pace.map(|pace| proto::Pace {
            step_us: pace.step_us as f32,
            sequence_us: pace.sequence_us as f32,
            context_ns: pace.context_ns as f32,
            token_us: pace.token_us as f32,
            pair_ns: pace.pair_ns as f32,
        });
        proto::Load {
            running: self.running as u32,
            waiting: self.waiting as u32,
            waiting_tokens: self.waiting_tokens as u64,
            pages_free: self.pages_free as u32,
            pages_total: self.pages_total as u32,
            handoffs: self.handoffs as u32,
            link_bytes_per_s: self.link_bytes_per_s as f32,
            draining: self.draining,
            pace,
            backlog_ms: self.backlog_ms as f32,
            legs: self.legs as u32,
            received,
        }
    }
}
