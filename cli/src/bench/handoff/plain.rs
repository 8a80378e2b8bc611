//! The same bytes, moved without any protocol.

use crate::bench::{machine::loopback_pair, stats::Samples};
use anyhow::Context;
use kv_cache::PageLayout;
use std::{
    hint::black_box,
    io::{Read, Write},
    thread,
    time::Instant,
};

const ROUNDS: usize = 50;

/// Returns the median microseconds of copying `bytes` in blocks from pool to pool, on one thread. Blocks are spread over the
/// pool by a stride, so that neither a cache nor the prefetcher helps more than it does in a real hand-off.
pub(super) fn memcpy_us(layout: &PageLayout, bytes: usize) -> f64 {
    let (pool, block) = (layout.pool_bytes(), layout.block_bytes());
    let source = vec![1_u8; pool];
    let mut target = vec![0_u8; pool];
    let blocks = pool / block;
    // Odd, so that it meets every block of a pool of 2^n blocks before any comes again.
    let stride = (blocks / 3) | 1;
    let mut at = 0;
    let mut copy = || {
        let began = Instant::now();
        for _ in 0..bytes / block {
            let from = at * block;
            let to = (blocks - 1 - at) * block;
            target[to..to + block].copy_from_slice(&source[from..from + block]);
            at = (at + stride) % blocks;
        }
        black_box(&mut target);
        began.elapsed().as_secs_f64() * 1e6
    };
    // Faults the pages in.
    for _ in 0..pool / bytes {
        copy();
    }
    (0..ROUNDS).map(|_| copy()).collect::<Samples>().median()
}

/// Returns the median microseconds from the first byte written until the reader, which holds all `bytes`, has said so.
pub(super) fn tcp_us(bytes: usize) -> anyhow::Result<f64> {
    let (mut sender, mut receiver) = loopback_pair()?;
    let reading = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; bytes];
        for _ in 0..=ROUNDS {
            receiver.read_exact(&mut buffer)?;
            receiver.write_all(&[1])?;
        }
        Ok(())
    });
    let message = vec![1; bytes];
    let mut send = || -> std::io::Result<f64> {
        let began = Instant::now();
        sender.write_all(&message)?;
        sender.read_exact(&mut [0])?;
        Ok(began.elapsed().as_secs_f64() * 1e6)
    };
    send().context("warm the connection up")?;
    let rounds: std::io::Result<Samples> = (0..ROUNDS).map(|_| send()).collect();
    let median = rounds?.median();
    reading.join().expect("the reader does not panic")?;
    Ok(median)
}
