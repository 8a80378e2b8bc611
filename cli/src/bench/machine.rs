//! What this machine can do at most. Arithmetic and memory are the engine's own probes, the loopback is measured here.

use super::{report::Report, stats::Samples};
use crate::model::cores;
use anyhow::Context;
use engine::machine::{self, Arithmetic};
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

/// What bounds an engine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peak {
    /// Billions of bf16 multiplications and additions per second, all cores.
    pub(super) bf16_gflops: f64,
    /// The same in f32.
    pub(super) f32_gflops: f64,
    /// Billions of bytes read from memory per second, all cores.
    pub(super) read_gbs: f64,
}

impl Peak {
    /// Measures, for about two seconds.
    pub(super) fn measure() -> anyhow::Result<Self> {
        let threads = cores();
        Ok(Self {
            bf16_gflops: machine::peak_gflops(Arithmetic::Bf16, threads)?,
            f32_gflops: machine::peak_gflops(Arithmetic::F32, threads)?,
            read_gbs: machine::read_gigabytes_per_second(threads)?,
        })
    }
}

/// Measures every `machine/` row that is wanted.
pub(super) fn run(report: &mut Report, peak: Option<&Peak>) -> anyhow::Result<()> {
    if let Some(peak) = peak {
        report.row("machine/bf16_gflops", peak.bf16_gflops, "GFLOP/s", None)?;
        report.row("machine/f32_gflops", peak.f32_gflops, "GFLOP/s", None)?;
        report.row("machine/read_gbs", peak.read_gbs, "GB/s", None)?;
    }
    if report.wants("machine/memcpy_gbs") {
        report.row("machine/memcpy_gbs", machine::copy_gigabytes_per_second(cores())?, "GB/s", None)?;
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
