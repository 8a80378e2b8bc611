//! `ucx`: RDMA, NVLink and whatever else UCX finds between two machines; the source puts blocks into the target's pool.
//!
//! UCX is a library of the system, opened when a worker starts: when it is required, or when the host has RDMA devices. Without
//! those it is not preferred to the other transports, which are faster on one host and over Ethernet.
//!
//! **One thread owns it** ([`owner`]): UCX's calls are not made for many threads, and its progress is not for a reactor. It takes
//! frames from the queues of its links, puts the runs of a frame as they are, asks once per frame when all of them are in the
//! target's memory, and only then says so. Idle it sleeps in `poll`; it spins for a few microseconds at most, since a core that
//! polls is a core that nobody computes on.
//!
//! **Handshake.** The target makes a UCX worker for the link, and `Welcome` tells its address, the key to the pool and where the
//! pool lies ([`Window`]). UCX believes what it reads in these, so a link has authenticated itself before. The source makes a worker, tells its address
//! (`Calling`), and when the target has made an endpoint to it (`Expected`) connects and reads a word of the pool; when it cannot, both agree on
//! something else. The target's endpoint carries nothing. Without it UCX (to 1.22 at least) makes one by itself when a source connects, and
//! where that source is gone by then (`kill -9` will do) brings the target's process down: what it answers on was never set up
//! (`ucp_ep_set_failed` of an endpoint without a configuration).
//!
//! **Who may write** is as with shared memory: the source holds a permit of each landing (see [`landing`](crate::landing)) until
//! it vouches, which it does once a flush has shown that its puts are there, or its own copies are done. When its link is lost, it can write nothing more
//! once
//!
//! - the link's worker is destroyed here, and with it the queue pair, socket or queue that puts come through. UCX turns puts into
//!   messages where a transport cannot write by itself, and those are written when this worker makes progress;
//! - and, on this host, where a source may have mapped the pool: it has said that its endpoint is closed, or its process has ended.
//!   Both come over the Unix socket of [`shm`](super::shm); two processes that cannot reach each other that way do not use UCX.
//!
//! For the same reason frames that were under way when a connection failed come back to their owner only after the control
//! connection has ended: nobody may vouch for them any more.
//!
//! **Lanes that write by themselves.** Where UCX turns puts into messages, the target answers each, and UCX (to 1.22 at least) aborts
//! the target's process when the connection that it answers on has failed, which over its tcp it has when a peer was killed:
//! `unexpected error: Endpoint timeout` (`ucp_rma_sw_send_cmpl`, `ucp_request_try_send`). No setting changes that. So a link whose
//! lanes are no RDMA is given up for another transport, unless UCX is required. And a link that is closed ends what is under way
//! first, if it can within 200 ms, so that only the death of a source over such lanes does this.
//!
//! **Pools that UCX maps.** Over shared memory (`posix`, `sysv`) UCX maps memory of a peer that it allocated, and a put is a `memcpy` on
//! its thread. There the source writes by itself: the copiers of [`shm`] get the map ([`Mapped`]) in place of one of their own
//! and need neither puts nor a flush. It is the key's, so the thread keeps endpoint and key until the last copier has dropped it,
//! however the link ends; then it unmaps the pool and gives the word. A target that dies takes nothing from under a copy: the memory
//! is a file's. What may be a device's, or lies in more than one map, is left to UCX, as is everything when there is no word to give.
//!
//! Whether a peer lives is never asked of UCX (it takes seconds, or forever over shared memory): the control connection knows.
//!
//! **Memory.** What UCX takes for a worker per link at either end; the pool is registered once.

mod allocated;
mod directory;
mod handles;
mod maps;
mod owner;
mod survey;

pub use allocated::UcxMemory;
pub use survey::{Survey, survey};

use super::{
    Job, JobQueue, Transport,
    shm::{Remote, Writable},
};
use crate::{
    Config, HandoffId,
    link::{HANDSHAKE_LIMIT, LinkStop},
    message::Message,
    pages::Pages,
    plan::Terms,
};
use directory::Directory;
use handles::Context;
use owner::{Command, Connect, Owner};
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

/// Longest worker address or pool key of a peer that is believed. A few hundred bytes are usual.
pub(crate) const LONGEST_NAME: usize = 4096;
/// Longest a connection may take before something else is agreed on: a part of what a handshake may take.
const CONNECT_LIMIT: Duration = Duration::from_millis(800);
/// Longest that UCX may take to open its devices and register the pool; usually a second.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Links being made at once; further ones fail.
const MOST_COMMANDS: usize = 256;

/// Settings of transport `ucx`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UcxConfig {
    /// Path of `libucp.so.0`; unset = where the system looks.
    pub library: Option<PathBuf>,
    /// Transports UCX may use, as its own setting `UCX_TLS` names them; unset = all it finds.
    pub tls: Option<String>,
}

/// What a source needs to write into a target's pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Window {
    /// Of the link's worker at the target.
    #[serde(with = "hex")]
    pub(crate) address: Vec<u8>,
    /// To the pool.
    #[serde(with = "hex")]
    pub(crate) key: Vec<u8>,
    /// Where the pool begins, in the target's address space.
    pub(crate) base: u64,
}

/// Bytes as text, of a bounded length.
mod hex {
    use super::*;
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        bytes.iter().for_each(|byte| write!(text, "{byte:02x}").expect("strings take all"));
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.len() > 2 * LONGEST_NAME || text.len() % 2 != 0 {
            return Err(D::Error::custom(format!("{} digits, at most {} in pairs", text.len(), 2 * LONGEST_NAME)));
        }
        let byte = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}

/// One worker's UCX. Dropping it ends the thread, once nothing is under way.
#[derive(Debug)]
pub(crate) struct Ucx {
    shared: Arc<Shared>,
    worthwhile: bool,
}

/// What the thread and everybody else touch.
#[derive(Debug)]
struct Shared {
    commands: Mutex<VecDeque<Command>>,
    /// A byte here wakes the thread.
    waker: UnixStream,
    stop: AtomicBool,
}

impl Shared {
    /// Adds a command, unless `most` wait.
    fn command(&self, command: Command, most: usize) -> bool {
        // Whole between any two statements.
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let room = commands.len() < most;
        if room {
            commands.push_back(command);
        }
        drop(commands);
        self.wake();
        room
    }

    /// Makes the thread look again.
    fn wake(&self) {
        // Full means that it will be woken anyway; closed, that it is gone.
        let _ = (&self.waker).write(&[1]);
    }
}

impl Ucx {
    /// Says whether to have it: where it is required, or can be worth while.
    pub(crate) fn is_wanted(config: &Config) -> bool {
        match config.require {
            Some(only) => only == crate::TransportKind::Ucx,
            None => !survey::infiniband_devices(Path::new("/sys")).is_empty(),
        }
    }

    /// Opens the library and its devices, and registers the pool, which is mapped from `file`. Takes up to a second.
    pub(crate) async fn start(config: &UcxConfig, pool: Arc<Pages>, file: &File) -> Result<Self, String> {
        let (waker, woken) = socket_pair().map_err(|error| format!("make a socket pair: {error}"))?;
        let shared = Arc::new(Shared { commands: Mutex::default(), waker, stop: AtomicBool::new(false) });
        let (ready, started) = oneshot::channel();
        let (config, theirs, allocated) = (config.clone(), shared.clone(), allocated::find(allocated::name(file)));
        let run = move || match Owner::open(&config, pool, allocated, woken) {
            Ok((owner, worthwhile)) => {
                let _ = ready.send(Ok(worthwhile));
                owner.run(&theirs);
            }
            Err(reason) => drop(ready.send(Err(reason))),
        };
        thread::Builder::new().name("kv-ucx".into()).spawn(run).map_err(|error| format!("start a thread: {error}"))?;
        let worthwhile = answered(START_LIMIT, started).await??;
        Ok(Self { shared, worthwhile })
    }

    /// Says whether to offer it without being required: it has RDMA devices and a version to rely on.
    pub(crate) fn is_worthwhile(&self) -> bool {
        self.worthwhile
    }

    /// Target: makes the worker of the link with `token`. The source may write once it is told.
    pub(crate) async fn accept(&self, token: u64) -> Result<Window, String> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Accept { token, reply })?;
        // Dropping the answer drops the worker that it was to tell of.
        answered(CONNECT_LIMIT, answer).await?
    }

    /// Target: destroys the worker of the link with `token`. Once this is over, no write of another host can come through it: there is
    /// no limit to the wait for that.
    pub(crate) async fn release(&self, token: u64) {
        let (reply, done) = oneshot::channel();
        self.shared.command(Command::Release { token, reply }, usize::MAX);
        // A thread that is gone has destroyed everything.
        let _ = done.await;
    }

    /// Target: connects the worker of the link with `token` to the source's worker at `address`.
    pub(crate) async fn meet(&self, token: u64, address: Vec<u8>) -> Result<(), String> {
        let (reply, met) = oneshot::channel();
        self.command(Command::Meet { token, address, reply })?;
        answered(CONNECT_LIMIT, met).await?
    }

    /// Source: makes the worker of a link to a target. `word` tells a target on this host when its pool can no longer be written.
    pub(crate) async fn open(
        &self,
        window: Window,
        path: LinkPath,
        word: Option<Remote>,
        stop: &LinkStop,
    ) -> Result<Opening, String> {
        let (reply, answer) = oneshot::channel();
        let (address, told) = oneshot::channel();
        let (expect, expected) = oneshot::channel();
        let (queue, closed) = (JobQueue::new(1), Arc::new(AtomicBool::new(false)));
        // Required, there is nothing to fall back to in the rest of the time.
        let limit = if path.emulated { HANDSHAKE_LIMIT } else { CONNECT_LIMIT };
        // Closes the link when nobody waits for the answer any more.
        let source = Source { queue: queue.clone(), closed: closed.clone(), shared: self.shared.clone() };
        let connect = Box::new(Connect { window, path, word, queue, closed, stop: stop.clone(), expected, reply });
        self.command(Command::Open { connect, address })?;
        Ok(Opening { address: answered(limit, told).await??, expect, answer, source, limit })
    }

    fn command(&self, command: Command) -> Result<(), String> {
        let taken = self.shared.command(command, MOST_COMMANDS);
        if taken { Ok(()) } else { Err(format!("{MOST_COMMANDS} links are being made")) }
    }
}

fn socket_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (one, other) = UnixStream::pair()?;
    one.set_nonblocking(true)?;
    other.set_nonblocking(true)?;
    Ok((one, other))
}

/// Waits for what the thread answers.
async fn answered<T>(limit: Duration, answer: oneshot::Receiver<T>) -> Result<T, String> {
    match timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err("the UCX thread has ended".to_owned()),
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

impl Drop for Ucx {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
    }
}

/// What a link's frames go through.
#[derive(Clone, Debug)]
pub(crate) struct LinkPath {
    /// How pages of the source become pages of the target.
    pub(crate) terms: Arc<Terms>,
    /// Whether contents are digested.
    pub(crate) digest: bool,
    /// Whether the link may go by lanes on which UCX turns puts into messages.
    pub(crate) emulated: bool,
    /// The link's control connection.
    pub(crate) say: mpsc::Sender<Message>,
}

/// How the bytes of a link get into the target's pool.
#[derive(Debug)]
pub(crate) enum Way {
    /// UCX puts them there.
    Puts(Source),
    /// The source writes them there itself, as over shared memory.
    Map(Mapped),
}

/// The target's pool, as UCX mapped it. Dropping it ends the link, and with it the map.
#[derive(Debug)]
pub(crate) struct Mapped {
    pages: Pages,
    _link: Source,
}

impl Writable for Mapped {}

impl AsRef<Pages> for Mapped {
    fn as_ref(&self) -> &Pages {
        &self.pages
    }
}

/// A source's worker that is to be connected once its target has [met](Ucx::meet) it. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Of the worker.
    pub(crate) address: Vec<u8>,
    expect: oneshot::Sender<()>,
    answer: oneshot::Receiver<Result<Option<Pages>, String>>,
    source: Source,
    /// Longest that each of the steps may take.
    pub(crate) limit: Duration,
}

impl Opening {
    /// Connects, and waits until something of the target's has been read. Returns the pool where UCX mapped it.
    pub(crate) async fn connect(self) -> Result<Way, String> {
        let Self { expect, answer, source, limit, .. } = self;
        // A thread that is gone does not answer either.
        let _ = expect.send(());
        source.shared.wake();
        Ok(match answered(limit, answer).await?? {
            Some(pages) => Way::Map(Mapped { pages, _link: source }),
            None => Way::Puts(source),
        })
    }
}

/// The source's end.
#[derive(Debug)]
pub(crate) struct Source {
    queue: Arc<JobQueue>,
    closed: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Transport for Source {
    fn post(&self, job: Job) {
        self.queue.post(job);
        self.shared.wake();
    }

    fn cancel(&self, handoff: HandoffId) {
        self.queue.cancel(handoff);
    }

    fn close(&self) {
        self.queue.close();
        self.closed.store(true, Ordering::Release);
        self.shared.wake();
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.close();
    }
}

/// Opens the library and the devices that `config` allows.
fn open(config: &UcxConfig) -> Result<Arc<Context>, String> {
    let api = ucx_sys::load(config.library.as_deref(), heard).map_err(|error| error.to_string())?;
    let directory = Directory::new()?;
    let files = directory.path().to_owned();
    let mut settings = vec![
        // Else UCX's posix is hidden from endpoints that are to survive their peer.
        ("MM_ERROR_HANDLING", "y"),
        // Where it allocates, what it can write by itself.
        ("ALLOC_PRIO", "md:posix,huge,thp,mmap"),
        // Sixteen times the default: twice as fast over loopback.
        ("TCP_TX_SEG_SIZE", "128k"),
        ("TCP_RX_SEG_SIZE", "128k"),
        // Pools are registered once; nothing is to be remembered by hooks in `munmap`.
        ("RCACHE_ENABLE", "n"),
    ];
    // What the operator has set for UCX stands.
    settings.retain(|(name, _)| std::env::var_os(format!("UCX_{name}")).is_none());
    // Except for these: see there.
    settings.extend([("POSIX_USE_PROC_LINK", "n"), ("POSIX_DIR", &files)]);
    if !api.at_least((1, 17)) {
        // Settings of a transport were named without it.
        let plain = |name: &'static str| name.strip_prefix("TCP_").or(name.strip_prefix("POSIX_")).unwrap_or(name);
        settings.iter_mut().for_each(|(name, _)| *name = plain(name));
    }
    settings.extend(config.tls.as_deref().map(|tls| ("TLS", tls)));
    Context::open(api, &settings, directory)
}

fn heard(level: ucx_sys::Level, text: &str) {
    match level {
        ucx_sys::Level::Error => tracing::error!(target: "ucx", "{text}"),
        ucx_sys::Level::Warn => tracing::warn!(target: "ucx", "{text}"),
        ucx_sys::Level::Info => tracing::info!(target: "ucx", "{text}"),
        ucx_sys::Level::Debug => tracing::debug!(target: "ucx", "{text}"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
