//! `tcp`: between any two machines, over a few data connections per link.
//!
//! A frame is a `Pages` header and then its blocks, end to end, written vectored straight from the source's pages and read
//! straight into the landing's. All connections of a link draw frames from one queue, so a slow one gets fewer. Back-pressure
//! is the kernel's: at most the socket buffers are in flight, and whatever waits is only descriptors.
//!
//! The *target* writes its own pages. A frame for a landing that is closed, or that fails admission, is read and thrown away,
//! which is why closing the landing, or the connection, proves that nothing more of it can land.

use super::{BURST_BYTES, EndsLink, Job, JobQueue, Queued};
use crate::{
    HandoffId,
    digest::FrameHasher,
    landing::{Landing, Landings},
    link::LinkStop,
    message::{Message, frame_bytes},
    mover::Movers,
    pages::Pages,
    plan::{self, Piece, Place, Terms},
    socket::{Data, Detached},
};
use kv_cache::Extent;
use std::{
    convert::Infallible,
    io::{self, IoSlice, IoSliceMut},
    sync::Arc,
};

/// Most bytes in one system call. Fewer, and each end wakes the other more often: runs move 13 % slower over loopback with a quarter of it.
const CALL_BYTES: usize = 1 << 20;
/// Most extents in one system call; the kernel takes 1024.
const MOST_SLICES: usize = 256;
/// Longest header believed: a frame of [`BURST_BYTES`]-sized blocks needs a few dozen bytes, one of tiny blocks some kilobytes.
const LONGEST_HEADER: usize = 1 << 20;

/// Bytes thrown away at a time.
const DISCARD_BYTES: usize = 16 << 10;

/// What a link's senders share.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// The source's pool.
    pub(crate) pool: Arc<Pages>,
    /// How its pages become pages of the target.
    pub(crate) terms: Arc<Terms>,
    /// Whether contents are digested.
    pub(crate) digest: bool,
}

/// Starts a sender per connection.
pub(crate) fn start(streams: Vec<Detached>, path: &Path, movers: &Movers, link: &LinkStop) -> Queued {
    let queued = Queued::new(streams.len());
    for (number, stream) in streams.into_iter().enumerate() {
        let (queue, path) = (queued.queue.clone(), path.clone());
        queued.run(movers, number, (link, "a data connection ended"), async move {
            match send_frames(stream, (&queue, number), &path).await {
                Ok(never) => match never {},
                Err(error) => format!("data connection: {error}"),
            }
        });
    }
    queued
}

async fn send_frames(stream: Detached, (queue, number): (&JobQueue, usize), path: &Path) -> io::Result<Infallible> {
    let mut stream = stream.attach()?;
    loop {
        send_frame(&mut stream, queue.next(number).await, path).await?;
    }
}

async fn send_frame(stream: &mut Data, job: Job, path: &Path) -> io::Result<()> {
    let (frame, pool) = (&job.frame, &path.pool);
    let mut header = Vec::new();
    let pieces = frame.pieces.clone();
    Message::Pages { handoff: frame.handoff, sequence: frame.sequence, pieces }.encode(&mut header);
    let mut hasher = path.digest.then(|| FrameHasher::new(frame.handoff, frame.sequence, &frame.pieces));
    let place = Place { view: &path.terms.source, pages: &frame.pages };
    pool.fetch(place, &frame.pieces).map_err(io::Error::other)?;
    if path.terms.converts() {
        for part in plan::parts(&path.terms, &frame.pieces, BURST_BYTES) {
            // SAFETY: the blocks are frozen until this job reports back.
            let blocks = unsafe { pool.converted(&path.terms, &frame.pages, &part) };
            if let Some(hasher) = &mut hasher {
                hasher.update(&blocks);
            }
            stream.write_all(&mut [IoSlice::new(&header), IoSlice::new(&blocks)]).await?;
            header.clear();
        }
        job.finish(hasher.map(FrameHasher::finish));
        return Ok(());
    }
    for burst in bursts(plan::extents(place, &frame.pieces), call_bytes(path.digest)) {
        // SAFETY: the blocks are frozen until this job reports back, which it does when it is dropped, after these slices.
        let blocks: Vec<&[u8]> = burst.into_iter().map(|extent| unsafe { pool.bytes(extent) }).collect();
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(blocks.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(blocks.iter().map(|block| IoSlice::new(block)));
        stream.write_all(&mut slices).await?;
        // Afterwards: the kernel's copy fetches from memory what the digest then finds in the cache. The other way round the digest
        // waits for memory, at half the speed of a copy.
        if let Some(hasher) = &mut hasher {
            blocks.iter().for_each(|block| hasher.update(block));
        }
        header.clear();
        tokio::task::yield_now().await;
    }
    job.finish(hasher.map(FrameHasher::finish));
    Ok(())
}

/// The target's end of one data connection.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) landings: Arc<Landings>,
    /// Token of the link: names the landings that may be written.
    pub(crate) token: u64,
    /// Bytes of one block here and there.
    pub(crate) block_bytes: usize,
    /// Whether contents are digested.
    pub(crate) digest: bool,
}

impl Receiver {
    /// Starts reading frames on `movers` until the link stops, which it does when the connection ends.
    pub(crate) fn start(self, number: usize, stream: Detached, movers: &Movers, link: &LinkStop) {
        let (link, ends) = (link.clone(), EndsLink(link.clone(), "a data connection ended"));
        movers.spawn(number, async move {
            let receiving = async {
                let mut stream = stream.attach()?;
                loop {
                    self.receive_frame(&mut stream).await?;
                }
            };
            let ended: Option<io::Result<()>> = link.token().run_until_cancelled(receiving).await;
            if let Some(Err(error)) = ended {
                link.stop(format!("data connection: {error}"));
            }
            drop(ends);
        });
    }

    /// Reads one frame, into its pages or nowhere.
    pub(crate) async fn receive_frame(&self, stream: &mut Data) -> io::Result<()> {
        let (handoff, sequence, pieces) = read_header(stream).await?;
        // Bounded whatever the peer says: blocks of a frame are counted in 64 bits and only ever read into pages or thrown away.
        let bytes = payload_bytes(&pieces, self.block_bytes)?;
        let admitted = self.landings.find(handoff, self.token).filter(|landing| landing.admit(&pieces));
        let left = match &admitted {
            Some(landing) => self.land(stream, landing, (handoff, sequence, &pieces)).await?,
            None => bytes,
        };
        if admitted.is_none() || left > 0 {
            self.landings.stale(handoff);
        }
        discard(stream, left).await
    }

    /// Reads a frame into its pages. Returns the bytes still to come when the landing was closed meanwhile.
    async fn land(
        &self,
        stream: &mut Data,
        landing: &Landing,
        (handoff, sequence, pieces): (HandoffId, u32, &[Piece]),
    ) -> io::Result<u64> {
        let mut hasher = self.digest.then(|| FrameHasher::new(handoff, sequence, pieces));
        let mut left = plan::blocks(pieces) * self.block_bytes as u64;
        for burst in bursts(plan::extents(landing.place(), pieces), call_bytes(self.digest)) {
            let read = fill(stream, landing, &burst).await?;
            left -= read;
            if read < burst.iter().map(|extent| extent.bytes as u64).sum() {
                return Ok(left);
            }
            if let Some(hasher) = &mut hasher {
                let Some(_permit) = landing.enter() else { return Ok(left) };
                // SAFETY: admitted to this frame alone and the permit is held, so nobody writes these blocks.
                burst.into_iter().for_each(|extent| hasher.update(unsafe { landing.pool().bytes(extent) }));
            }
            tokio::task::yield_now().await;
        }
        if let Some(permit) = landing.enter() {
            landing.landed(&permit, sequence, pieces, hasher.map(FrameHasher::finish));
        }
        Ok(left)
    }
}

/// Reads into `extents` of the landing until they are full or it is closed. Returns the bytes read. A permit is held only while
/// the kernel copies what is there already, never while waiting for more.
async fn fill(stream: &mut Data, landing: &Landing, extents: &[Extent]) -> io::Result<u64> {
    let wanted: usize = extents.iter().map(|extent| extent.bytes).sum();
    let mut read = 0;
    while read < wanted {
        let Some(permit) = landing.enter() else { break };
        // SAFETY: admitted to this frame alone, each extent once, and the permit is held while the slices live.
        let blocks = extents.iter().map(|extent| IoSliceMut::new(unsafe { landing.pool().bytes_mut(*extent) }));
        let mut slices: Vec<IoSliceMut<'_>> = blocks.collect();
        let mut rest = slices.as_mut_slice();
        IoSliceMut::advance_slices(&mut rest, read);
        let bytes = stream.try_read(rest)?;
        drop(permit);
        match bytes {
            Some(bytes) => read += bytes,
            None => stream.readable().await?,
        }
    }
    Ok(read as u64)
}

async fn read_header(stream: &mut Data) -> io::Result<(HandoffId, u32, Vec<Piece>)> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let bytes = frame_bytes(prefix).map_err(io::Error::other)?;
    if bytes > LONGEST_HEADER {
        return Err(io::Error::other(format!("header of {bytes} bytes")));
    }
    let mut header = vec![0; bytes];
    stream.read_exact(&mut header).await?;
    match Message::decode(&header) {
        Ok(Message::Pages { handoff, sequence, pieces }) => Ok((handoff, sequence, pieces)),
        Ok(other) => Err(io::Error::other(format!("{other:?} on a data connection"))),
        Err(error) => Err(io::Error::other(error)),
    }
}

fn payload_bytes(pieces: &[Piece], block_bytes: usize) -> io::Result<u64> {
    if pieces.iter().any(|piece| piece.pages.start >= piece.pages.end) {
        return Err(io::Error::other("a piece without pages"));
    }
    Ok(plan::blocks(pieces).saturating_mul(block_bytes as u64))
}

async fn discard(stream: &mut Data, mut bytes: u64) -> io::Result<()> {
    let mut nowhere = vec![0; if bytes > 0 { DISCARD_BYTES } else { 0 }];
    while bytes > 0 {
        let most = bytes.min(DISCARD_BYTES as u64) as usize;
        stream.read_exact(&mut nowhere[..most]).await?;
        bytes -= most as u64;
    }
    Ok(())
}

/// Returns how much to move before looking at anything else: what is digested then is still in the cache.
fn call_bytes(digest: bool) -> usize {
    if digest { BURST_BYTES } else { CALL_BYTES }
}

/// Cuts extents into groups of at most `most` bytes and [`MOST_SLICES`] extents.
fn bursts(extents: Vec<Extent>, most: usize) -> impl Iterator<Item = Vec<Extent>> {
    let mut rest = extents.into_iter();
    let mut cut: Option<Extent> = None;
    std::iter::from_fn(move || {
        let mut burst = Vec::new();
        let mut room = most;
        while room > 0 && burst.len() < MOST_SLICES {
            let Some(extent) = cut.take().or_else(|| rest.next()) else { break };
            let bytes = extent.bytes.min(room);
            burst.push(Extent { offset: extent.offset, bytes });
            room -= bytes;
            if bytes < extent.bytes {
                cut = Some(Extent { offset: extent.offset + bytes, bytes: extent.bytes - bytes });
            }
        }
        (!burst.is_empty()).then_some(burst)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        handoffs::Moved,
        inbox::{Inbox, Note},
        testing::{contents, fill, layout, pool},
    };
    use kv_cache::PageId;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn bursts_hold_every_byte_once_in_order() {
        let extents = vec![
            Extent { offset: 10, bytes: 5 },
            Extent { offset: 100, bytes: 2 * BURST_BYTES },
            Extent { offset: 7, bytes: 1 },
        ];
        let bursts: Vec<_> = bursts(extents, BURST_BYTES).collect();
        assert_eq!(
            bursts,
            [
                vec![Extent { offset: 10, bytes: 5 }, Extent { offset: 100, bytes: BURST_BYTES - 5 }],
                vec![Extent { offset: 95 + BURST_BYTES, bytes: BURST_BYTES }],
                vec![Extent { offset: 95 + 2 * BURST_BYTES, bytes: 5 }, Extent { offset: 7, bytes: 1 }],
            ]
        );
        let tiny = (0..MOST_SLICES + 1).map(|at| Extent { offset: 2 * at, bytes: 1 }).collect();
        assert_eq!(self::bursts(tiny, BURST_BYTES).map(|burst| burst.len()).collect::<Vec<_>>(), [MOST_SLICES, 1]);
    }

    /// A peer that sends what it was not asked for: every such frame is read, thrown away and counted, the connection goes on,
    /// and only the blocks that were asked for change.
    #[tokio::test]
    async fn only_what_was_asked_for_is_written() {
        let layout = layout(2, 6);
        let file = pool(&layout);
        fill(&file, &vec![0xA5; layout.pool_bytes()]);
        let inbox = Arc::new(Inbox::default());
        let pages = Arc::new(Pages::map(&file, layout.clone()).expect("map"));
        let landings = Arc::new(Landings::new(pages, inbox.clone()));
        let (good, closed) = (HandoffId(1), HandoffId(2));
        let link = |token| (token, plan::Terms::same(&layout, &layout));
        landings.open(good, link(7), [4, 2].map(PageId).as_slice().into(), 0..2);
        landings.open(closed, link(7), [0].map(PageId).as_slice().into(), 0..1);
        landings.open(HandoffId(3), link(8), [1].map(PageId).as_slice().into(), 0..1);
        landings.seal(closed);

        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let mut peer = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connect");
        let mut stream = Data::from(listener.accept().await.expect("accept").0);
        let block_bytes = layout.block_bytes();
        let receiver = Receiver { landings, token: 7, block_bytes, digest: false };
        let piece = |layer, pages| Piece { layer, pages };
        let frames = [
            (good, vec![piece(0, 0..3)]),                 // beyond the sequence
            (good, vec![piece(2, 0..1)]),                 // beyond the layers
            (good, vec![piece(0, 0..1), piece(0, 0..1)]), // twice in one frame
            (closed, vec![piece(0, 0..1)]),
            (HandoffId(3), vec![piece(0, 0..1)]), // another link's
            (HandoffId(4), vec![piece(0, 0..1)]), // nobody's
            (good, vec![piece(1, 1..2)]),
            (good, vec![piece(1, 1..2)]), // a second time
        ];
        for (byte, (handoff, pieces)) in frames.iter().enumerate() {
            let mut bytes = Vec::new();
            Message::Pages { handoff: *handoff, sequence: 0, pieces: pieces.clone() }.encode(&mut bytes);
            bytes.resize(bytes.len() + plan::blocks(pieces) as usize * block_bytes, byte as u8);
            peer.write_all(&bytes).await.expect("write");
            receiver.receive_frame(&mut stream).await.expect("the connection goes on");
        }
        let mut expected = vec![0xA5; layout.pool_bytes()];
        let at = layout.block_offset(1, PageId(2));
        expected[at..at + block_bytes].fill(6);
        assert!(contents(&file, &layout) == expected);
        let mut notes = Vec::new();
        inbox.take(&mut notes).await;
        let count = |kind: fn(&Moved) -> bool| {
            notes.iter().filter(|(_, note)| matches!(note, Note::Moved(_, moved) if kind(moved))).count()
        };
        assert_eq!(count(|moved| matches!(moved, Moved::Stale)), 7);
        assert_eq!(count(|moved| matches!(moved, Moved::Landed { bytes: 384, .. })), 1);
    }

    #[test]
    fn a_frame_without_blocks_is_malformed() {
        assert!(payload_bytes(&[Piece { layer: 0, pages: 3..3 }], 1).is_err());
        let pieces = [Piece { layer: 0, pages: 0..u32::MAX }];
        assert_eq!(payload_bytes(&pieces, 1 << 40).unwrap(), u64::MAX);
    }
}
