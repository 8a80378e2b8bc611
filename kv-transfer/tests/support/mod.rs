//! A worker without an engine: a pool of random bytes, a transfer over it, and its events.
#![allow(dead_code)] // Each test file uses its part.

mod card;
pub(crate) mod proxy;
pub(crate) mod tls;

use card::Card;
use kv_cache::{Backing, KvDtype, PageId, PageLayout};
use kv_transfer::{
    Begin, Commit, Config, Event, HandoffId, Identity, Peer, Pool, Rank, Transfer, TransportKind, UcxConfig, UcxMemory,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::Path, sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// Longest a test waits for an event that must come.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Layers of every pool here.
pub(crate) const LAYERS: u32 = 4;

/// Blocks of 12 KiB.
pub(crate) fn layout(pages: u32) -> PageLayout {
    PageLayout { layers: LAYERS, page_tokens: 16, kv_heads: 4, key_dim: 64, value_dim: 32, dtype: KvDtype::Bf16, pages }
}

pub(crate) struct Worker {
    pub(crate) transfer: Transfer,
    pub(crate) identity: Identity,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) shutdown: CancellationToken,
    /// Where the pages are.
    file: File,
    _memory: Option<UcxMemory>,
}

/// A transport, and for UCX what it may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Memory,
    Cuda,
    Shm,
    /// Into pools of ours: puts are messages.
    UcxPosix,
    /// Into pools that UCX allocated: it maps them.
    UcxMapped,
    UcxTcp,
    Tcp,
    /// Pages are on cards: from one to the other in this process, and through the host.
    CardMemory,
    CardShm,
    CardTcp,
}

/// What [`Over::UcxMapped`] may use, and nothing else does.
const MAPPED: &str = "posix,sysv";
/// What workers with pages on cards may use, which do not ask.
const ON_CARDS: &str = "cards";

impl From<TransportKind> for Over {
    fn from(kind: TransportKind) -> Self {
        match kind {
            TransportKind::Memory => Self::Memory,
            TransportKind::Cuda => Self::Cuda,
            TransportKind::Shm => Self::Shm,
            TransportKind::Ucx => Self::UcxPosix,
            TransportKind::Tcp => Self::Tcp,
        }
    }
}

/// Every transport that this machine has. Says so where one is lacking.
pub(crate) fn kinds() -> Vec<Over> {
    let mut kinds = vec![Over::Memory, Over::Shm, Over::Tcp];
    kinds.extend([Over::Cuda, Over::CardMemory, Over::CardShm, Over::CardTcp]);
    match kv_transfer::survey(&UcxConfig { tls: None, ..only(Over::UcxTcp).ucx }) {
        Ok(found) if found.resources.iter().any(|resource| resource.starts_with("posix/")) => {
            kinds.extend([Over::UcxPosix, Over::UcxMapped, Over::UcxTcp]);
        }
        Ok(_) => {
            eprintln!("skipped: UCX does not connect by posix here, as in a container");
            kinds.push(Over::UcxTcp);
        }
        Err(reason) => eprintln!("skipped: no UCX here (tests/servers/install.sh): {reason}"),
    }
    kinds
}

/// Those over which links may end in the middle of anything. Not UCX over its tcp: it brings the target's process down where a put
/// that is a message arrives after its connection has ended (`ucp_rma_sw_send_cmpl`, "unexpected error: Endpoint timeout"), and is used
/// only where `ucx` is required.
pub(crate) fn kinds_that_break() -> Vec<Over> {
    kinds().into_iter().filter(|over| *over != Over::UcxTcp).collect()
}

impl Over {
    /// Returns its kind.
    pub(crate) fn kind(self) -> TransportKind {
        match self {
            Self::Memory | Self::CardMemory => TransportKind::Memory,
            Self::Cuda => TransportKind::Cuda,
            Self::Shm | Self::CardShm => TransportKind::Shm,
            Self::UcxPosix | Self::UcxMapped | Self::UcxTcp => TransportKind::Ucx,
            Self::Tcp | Self::CardTcp => TransportKind::Tcp,
        }
    }
}

/// Only over this transport.
pub(crate) fn only(over: impl Into<Over>) -> Config {
    let over = over.into();
    // As tests/servers/install.sh unpacks it; else the system's.
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-servers/ucx/lib/libucp.so.0");
    let tls = match over {
        Over::UcxTcp => "tcp",
        Over::UcxMapped => MAPPED,
        Over::Cuda | Over::CardMemory | Over::CardShm | Over::CardTcp => ON_CARDS,
        _ => "posix",
    };
    let ucx = UcxConfig { library: library.exists().then_some(library), tls: Some(tls.into()) };
    Config { require: Some(over.kind()), group_bytes: Some(64 << 10), ucx, ..Config::default() }
}

pub(crate) fn identity(worker: &str, pages: u32) -> Identity {
    Identity {
        worker: worker.into(),
        incarnation: 1_000,
        fingerprint: "weights".into(),
        layout: layout(pages),
        rank: Rank::default(),
    }
}

impl Worker {
    /// Starts one with a pool full of noise: every page is somebody else's until it is a landing.
    pub(crate) async fn start(config: Config, identity: Identity, seed: u64) -> Self {
        let bytes = identity.layout.pool_bytes();
        let memory = (config.ucx.tls.as_deref() == Some(MAPPED)).then(|| UcxMemory::new(&config.ucx, bytes));
        let memory = memory.map(|memory| memory.expect("memory of UCX"));
        let file =
            memory.as_ref().map_or_else(|| pool(bytes), |memory| memory.file().try_clone().expect("the same file"));
        let mut noise = vec![0; bytes];
        StdRng::seed_from_u64(seed).fill(&mut noise[..]);
        let card = (config.ucx.tls.as_deref() == Some(ON_CARDS)).then(|| pool(bytes));
        let clone = |file: &File| file.try_clone().expect("the same file");
        let pages = clone(card.as_ref().unwrap_or(&file));
        pages.write_all_at(&noise, 0).expect("fill pool");
        let backing = card.map(|memory| Arc::new(Card { pool: clone(&file), memory }) as Arc<dyn Backing>);
        let (sender, events) = mpsc::channel(64);
        let shutdown = CancellationToken::new();
        let pool = Pool { file: &file, backing };
        let transfer = Transfer::start(config, identity.clone(), pool, sender, shutdown.clone()).await.expect("start");
        Self { transfer, identity, events, shutdown, file: pages, _memory: memory }
    }

    pub(crate) fn peer(&self) -> Peer {
        let (worker, incarnation) = (self.identity.worker.clone(), self.identity.incarnation);
        Peer { worker, incarnation, link: self.transfer.address() }
    }

    pub(crate) async fn event(&mut self) -> Event {
        timeout(SOON, self.events.recv()).await.expect("an event in time").expect("transfer runs")
    }

    /// Waits for the next event and checks that it is for `handoff` and says that a source asks.
    pub(crate) async fn begun(&mut self, handoff: HandoffId) {
        match self.event().await {
            Event::Begun { handoff: begun, .. } if begun == handoff => {}
            other => panic!("{other:?} instead of Begun"),
        }
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.identity.layout.pool_bytes()];
        self.file.read_exact_at(&mut bytes, 0).expect("read pool");
        bytes
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        self.file.write_all_at(bytes, at as u64).expect("write pool");
    }

    /// Begins a hand-off of these pages to `target`.
    pub(crate) fn begin(&self, handoff: HandoffId, target: Peer, pages: &[PageId]) {
        let tokens = pages.len() as u32 * 16 - 3;
        self.transfer.begin(Begin { handoff, targets: vec![target], tokens, pages: pages.to_vec() });
    }

    /// Pushes pages `pages` in two groups of layers.
    pub(crate) fn push(&self, handoff: HandoffId, pages: Range<u32>) {
        self.transfer.push(handoff, 0..1, pages.clone());
        self.transfer.push(handoff, 1..LAYERS, pages);
    }

    pub(crate) fn commit(&self, handoff: HandoffId, first_token: u32) {
        self.transfer.commit(handoff, Commit { first_token });
    }
}

/// Memory that can be shared: a file whose size is sealed.
pub(crate) fn pool(bytes: usize) -> File {
    let file = File::from(memfd_create("pool", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(bytes as u64).expect("set length");
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).expect("seal");
    file
}

/// `count` pages of a pool, in no order.
pub(crate) fn some_pages(layout: &PageLayout, count: usize, seed: u64) -> Vec<PageId> {
    let mut pages: Vec<PageId> = (0..layout.pages).map(PageId).collect();
    pages.shuffle(&mut StdRng::seed_from_u64(seed));
    pages.truncate(count);
    pages
}

/// What the target's pool must hold: `before`, but for the landing pages from `have` on, which are the source's.
pub(crate) fn landed(
    (source, source_pages, source_bytes): (&PageLayout, &[PageId], &[u8]),
    (target, landing, before): (&PageLayout, &[PageId], &[u8]),
    have: usize,
) -> Vec<u8> {
    let mut expected = before.to_vec();
    for layer in 0..source.layers {
        for (from, to) in source_pages.iter().zip(landing).skip(have) {
            let (from, to) = (source.block_offset(layer, *from), target.block_offset(layer, *to));
            let block = source.block_bytes();
            expected[to..to + block].copy_from_slice(&source_bytes[from..from + block]);
        }
    }
    expected
}

/// Checks that no byte differs, without printing megabytes when one does.
pub(crate) fn assert_same(got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(got, expected)| got != expected);
    assert_eq!((got.len(), differs), (expected.len(), None), "first difference");
}
