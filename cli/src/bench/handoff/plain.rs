//! The same pieces, moved without any protocol.

use super::{
    Kind,
    case::{Case, Deal},
    pair::compute,
};
use crate::bench::{machine::loopback_pair, stats::Samples};
use anyhow::Context;
use kv_transfer::Config;
use std::{
    hint::black_box,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::TcpStream,
    ops::Range,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Bytes of one system call.
const CALL_BYTES: usize = 256 << 10;

/// Moves hand-offs, or some layers of each, plainly, as a link of a kind would at best.
pub(super) enum Plain {
    Memcpy(Memcpy),
    Sockets(Sockets),
}

impl Plain {
    pub(super) fn start(kind: Kind, case: Case, layers: Range<u32>) -> anyhow::Result<Self> {
        let moved = Moved { case, layers };
        let mut plain = if kind.shares_memory {
            Self::Memcpy(Memcpy::new(moved))
        } else {
            Self::Sockets(Sockets::start(moved, Config::default().tcp_streams).context("connect over loopback")?)
        };
        // Faults every page in.
        plain.measure(Deal::source(case).round(), Duration::ZERO)?;
        Ok(plain)
    }

    /// Returns the microseconds of each of `count` hand-offs, `pace` apart.
    pub(super) fn measure(&mut self, count: usize, pace: Duration) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for _ in 0..count {
            if !pace.is_zero() {
                compute(pace);
            }
            let took = match self {
                Self::Memcpy(memcpy) => memcpy.move_one(),
                Self::Sockets(sockets) => sockets.move_one()?,
            };
            samples.extend([took]);
        }
        Ok(samples)
    }
}

/// Returns the microseconds of each of `count` rounds, `pace` apart, in which a thread wakes a second, which, if it `asks`, asks a third over
/// loopback and has its answer. All sleep meanwhile.
pub(super) fn wakes(count: usize, pace: Duration, asks: bool) -> anyhow::Result<Samples> {
    let (mut ask, mut answer) = loopback_pair().context("connect over loopback")?;
    thread::spawn(move || {
        let mut word = [0];
        while answer.read_exact(&mut word).and_then(|()| answer.write_all(&word)).is_ok() {}
    });
    let (starts, started) = mpsc::channel::<Instant>();
    let (ends, ended) = mpsc::channel();
    thread::spawn(move || {
        for began in started {
            let answered = if asks { ask.write_all(&[1]).and_then(|()| ask.read_exact(&mut [0])) } else { Ok(()) };
            if ends.send(answered.map(|()| began.elapsed())).is_err() {
                return;
            }
        }
    });
    let mut samples = Samples::default();
    for _ in 0..count {
        compute(pace);
        starts.send(Instant::now()).context("the asking thread ended")?;
        samples.extend([ended.recv().context("the asking thread ended")??.as_secs_f64() * 1e6]);
    }
    Ok(samples)
}

/// What is moved of each hand-off.
#[derive(Clone)]
struct Moved {
    case: Case,
    layers: Range<u32>,
}

impl Moved {
    /// Returns the pieces of the next hand-off in a pool, in the order of layers and pages; neighbours are merged where both pools
    /// have them.
    fn pieces(&self, deal: &mut Deal) -> Vec<Range<usize>> {
        let (layout, pages) = (self.case.layout(), deal.next());
        let mut pieces: Vec<Range<usize>> = Vec::new();
        for layer in self.layers.clone() {
            for page in &pages {
                let start = layout.block_offset(layer, *page);
                match pieces.last_mut() {
                    Some(last) if last.end == start && self.case == Case::Runs => last.end += layout.block_bytes(),
                    _ => pieces.push(start..start + layout.block_bytes()),
                }
            }
        }
        pieces
    }
}

/// `memcpy` on one thread.
pub(super) struct Memcpy {
    moved: Moved,
    source: (Vec<u8>, Deal),
    target: (Vec<u8>, Deal),
}

impl Memcpy {
    fn new(moved: Moved) -> Self {
        let (case, bytes) = (moved.case, moved.case.layout().pool_bytes());
        Self { moved, source: (vec![1; bytes], Deal::source(case)), target: (vec![0; bytes], Deal::target(case)) }
    }

    fn move_one(&mut self) -> f64 {
        let (from, to) = (self.moved.pieces(&mut self.source.1), self.moved.pieces(&mut self.target.1));
        let began = Instant::now();
        for (from, to) in from.into_iter().zip(to) {
            self.target.0[to].copy_from_slice(&self.source.0[from]);
        }
        black_box(&mut self.target.0);
        began.elapsed().as_secs_f64() * 1e6
    }
}

/// Blocking sockets over loopback, each with its share of the pieces, a thread at either end.
pub(super) struct Sockets {
    moved: Moved,
    deal: Deal,
    senders: Vec<mpsc::Sender<Vec<Range<usize>>>>,
    done: mpsc::Receiver<io::Result<()>>,
}

impl Sockets {
    fn start(moved: Moved, streams: usize) -> io::Result<Self> {
        let source: Arc<Vec<u8>> = Arc::new(vec![1; moved.case.layout().pool_bytes()]);
        let (finished, done) = mpsc::channel();
        let mut senders = Vec::new();
        for number in 0..streams {
            let (sender, receiver) = loopback_pair()?;
            let theirs = moved.clone();
            thread::spawn(move || receive(receiver, &theirs, number..streams));
            let (pieces, wanted) = mpsc::channel();
            let (source, finished) = (source.clone(), finished.clone());
            thread::spawn(move || send(sender, &source, &wanted, &finished));
            senders.push(pieces);
        }
        Ok(Self { deal: Deal::source(moved.case), moved, senders, done })
    }

    fn move_one(&mut self) -> anyhow::Result<f64> {
        let streams = self.senders.len();
        let pieces = self.moved.pieces(&mut self.deal);
        let shares: Vec<_> = (0..streams).map(|number| share(&pieces, number..streams).to_vec()).collect();
        let began = Instant::now();
        for (sender, share) in self.senders.iter().zip(shares) {
            sender.send(share).context("a plain sender ended")?;
        }
        for _ in 0..streams {
            self.done.recv().context("a plain sender ended")??;
        }
        Ok(began.elapsed().as_secs_f64() * 1e6)
    }
}

/// Returns part `part.start` of `part.end` parts.
fn share(pieces: &[Range<usize>], part: Range<usize>) -> &[Range<usize>] {
    let at = |number: usize| pieces.len() * number / part.end;
    &pieces[at(part.start)..at(part.start + 1)]
}

fn send(
    mut stream: TcpStream,
    pool: &[u8],
    wanted: &mpsc::Receiver<Vec<Range<usize>>>,
    finished: &mpsc::Sender<io::Result<()>>,
) {
    while let Ok(pieces) = wanted.recv() {
        let sent = calls(&pieces).try_for_each(|call| {
            let mut slices: Vec<_> = call.iter().map(|piece| IoSlice::new(&pool[piece.clone()])).collect();
            let mut rest = slices.as_mut_slice();
            while !rest.is_empty() {
                let written = stream.write_vectored(rest)?;
                IoSlice::advance_slices(&mut rest, written);
            }
            Ok(())
        });
        let answered = sent.and_then(|()| stream.read_exact(&mut [0]));
        if finished.send(answered).is_err() {
            return;
        }
    }
}

/// Reads its share of one hand-off after another and says so after each, until the sender is gone.
fn receive(mut stream: TcpStream, moved: &Moved, part: Range<usize>) {
    let mut pool = vec![0; moved.case.layout().pool_bytes()];
    let mut deal = Deal::target(moved.case);
    let mut receive_one = || -> io::Result<()> {
        let pieces = moved.pieces(&mut deal);
        for call in calls(share(&pieces, part.clone())) {
            let bytes: usize = call.iter().map(ExactSizeIterator::len).sum();
            let mut read = 0;
            while read < bytes {
                let mut slices = slices_mut(&mut pool, call, read);
                match stream.read_vectored(&mut slices)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    more => read += more,
                }
            }
        }
        stream.write_all(&[1])
    };
    while receive_one().is_ok() {}
}

/// Views pieces of a pool, which may lie in any order, but for their first `skip` bytes.
fn slices_mut<'a>(pool: &'a mut [u8], pieces: &[Range<usize>], mut skip: usize) -> Vec<IoSliceMut<'a>> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_unstable_by_key(|at| pieces[*at].start);
    let mut slices: Vec<Option<&mut [u8]>> = pieces.iter().map(|_| None).collect();
    let (mut rest, mut at) = (pool, 0);
    for number in order {
        let piece = &pieces[number];
        let (_, tail) = rest.split_at_mut(piece.start - at);
        let (slice, tail) = tail.split_at_mut(piece.len());
        slices[number] = Some(slice);
        (rest, at) = (tail, piece.end);
    }
    let mut views = Vec::with_capacity(pieces.len());
    for slice in slices.into_iter().flatten() {
        let skipped = skip.min(slice.len());
        skip -= skipped;
        if skipped < slice.len() {
            views.push(IoSliceMut::new(&mut slice[skipped..]));
        }
    }
    views
}

/// Cuts pieces into what one system call moves.
fn calls(pieces: &[Range<usize>]) -> impl Iterator<Item = &[Range<usize>]> {
    let mut rest = pieces;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let count = rest.iter().take_while(|piece| {
            let fits = bytes == 0 || bytes + piece.len() <= CALL_BYTES;
            bytes += piece.len();
            fits
        });
        let (call, left) = rest.split_at(count.count());
        rest = left;
        (!call.is_empty()).then_some(call)
    })
}
