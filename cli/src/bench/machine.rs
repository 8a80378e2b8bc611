//! What this machine can do at most. Arithmetic and memory are the engine's own probes, the loopback is measured here.

use super::{report::Report, stats::Samples};
use crate::model::cores;
use anyhow::Context;
use engine::machine::{Arithmetic, Probes};
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::Instant,
};

/// Bytes per buffer: far beyond any cache.
const LARGE: usize = 256 << 20;
/// Repetitions; the best counts, since disturbance only ever slows.
const REPEAT: usize = 5;

/// Measures every `machine/` row that is wanted.
pub(super) fn run(report: &mut Report) -> anyhow::Result<()> {
    if report.wants("machine/") {
        let mut probes = Probes::new(cores())?;
        for (row, arithmetic) in [
            ("machine/bf16_gflops", Arithmetic::Bf16),
            ("machine/f32_gflops", Arithmetic::F32),
            ("machine/int8_gops", Arithmetic::Int8),
        ] {
            report.row(row, probes.peak(arithmetic), "Gop/s", None)?;
        }
        report.row("machine/read_gbs", probes.read(), "GB/s", None)?;
        report.row("machine/memcpy_gbs", probes.copy(), "GB/s", None)?;
    }
    if report.wants("machine/loopback_tcp_gbs") {
        report.row("machine/loopback_tcp_gbs", loopback_tcp_gbs()?, "GB/s", None)?;
    }
    Ok(())
}

/// Sends [`LARGE`] bytes over one loopback connection by blocking sockets.
fn loopback_tcp_gbs() -> anyhow::Result<f64> {
    let rounds: anyhow::Result<Samples> = (0..REPEAT).map(|_| send_over_loopback(LARGE)).collect();
    Ok(rounds?.best())
}

fn send_over_loopback(bytes: usize) -> anyhow::Result<f64> {
    const MESSAGE: usize = 1 << 20;
    let (mut sender, mut receiver) = loopback_pair().context("connect over loopback")?;
    let began = Instant::now();
    let reading = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; MESSAGE];
        for _ in 0..bytes / MESSAGE {
            receiver.read_exact(&mut buffer)?;
        }
        receiver.write_all(&[1])
    });
    let message = vec![1; MESSAGE];
    for _ in 0..bytes / MESSAGE {
        sender.write_all(&message).context("send over loopback")?;
    }
    sender.read_exact(&mut [0]).context("await the acknowledgement")?;
    let seconds = began.elapsed().as_secs_f64();
    reading.join().expect("the reader does not panic").context("receive over loopback")?;
    Ok(bytes as f64 / seconds / 1e9)
}

/// Returns two ends of one connection.
pub(super) fn loopback_pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    let (other, _) = listener.accept()?;
    one.set_nodelay(true)?;
    other.set_nodelay(true)?;
    Ok((one, other))
}
