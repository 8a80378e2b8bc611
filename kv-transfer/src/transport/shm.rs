//! `shm`: two processes of one host; the source writes into the target's pages through a map of its own.
//!
//! **How a source gets its map.** Its `Hello` invites: it names the host and a Unix socket (abstract, so that it leaves nothing
//! behind and belongs to a network namespace) on which it listens for this one handshake. A target on that host connects and
//! passes the descriptors of its pool and of the [words](crate::words) of its pages, with a proof that it is the target whom the
//! source dialled. The source maps both if their sizes can no longer change and fit the layout, and says so;
//! only then does `Welcome` say `shm`. So what is chosen has been seen to work, and when it does not work both ends still have
//! a connection on which to agree on something else. Each end checks that the other runs as the same user (or root).
//!
//! **Who may write.** The target cannot let writes in one by one, nor check where they go: a source that was let in could write
//! the whole pool, which is why only processes of the same user are let in, and links authenticate before that. It holds a
//! *permit* of each landing instead (see [`landing`](crate::landing)), given back with `Quiet`, `Commit` or a word that it settles,
//! and all of them once it can write no more. Of that there are two proofs, and nothing else counts:
//!
//! - the source's word on the socket that passed the descriptor, which it gives after it has unmapped the pool;
//! - its process is gone, which the pidfd says. That a socket closed says nothing: the process may live and write.
//!
//! **What came** is known from the source: after each frame it sends the frame's `Pages`, without blocks, on the control
//! connection; they are held against what was asked for exactly like those of a frame over tcp. With digests, the target
//! reads its own pages then, and its acknowledgement is a message. Without, it is a word of the landing, in which the source settles the
//! hand-off after its last write: to be woken, look and answer takes the other end as long as copying a megabyte.
//!
//! **Memory.** The map takes address space and 8 bytes of page table for every 4 KiB of the target's pool, in the source. The
//! first link of this kind makes the target take all of its pool from the system, in the background, so that pages are not
//! cleared while prompts wait for them.

mod copiers;
mod system;

pub(crate) use copiers::{Path, Writable, Written, start, start_passed, written};

use crate::{
    auth::{Claim, LinkKey, Proof},
    message::Invitation,
    pages::Pages,
    words::Words,
};
use kv_cache::{Backing, PageLayout, Reach};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    net::{UnixListener, UnixStream},
    time::timeout,
};

/// Longest a target tries to pass its pool before something else is agreed on: a part of what a handshake may take.
const SHARE_LIMIT: Duration = Duration::from_millis(800);
/// Bytes of a pool that are given memory, or page tables, between two looks at anything else.
const STEP_BYTES: usize = 1 << 20;
/// Most bytes of what is passed beside the files.
const MOST_PASSED: usize = 32 << 10;
/// The source's words on the socket: the pool is mapped; it is no longer.
const MAPPED: u8 = 1;
const UNMAPPED: u8 = 2;

/// Source: listens for one target's pool.
#[derive(Debug)]
pub(crate) struct Door {
    listener: UnixListener,
    invitation: Invitation,
}

impl Door {
    /// Opens one under a name that nobody can guess or keep.
    pub(crate) fn open() -> io::Result<Self> {
        let host = system::host().ok_or_else(|| io::Error::other("this host has no boot id"))?;
        let socket = format!("baton-kv-{:032x}", rand::random::<u128>());
        let listener = UnixListener::bind(format!("\0{socket}"))?;
        Ok(Self { listener, invitation: Invitation { host, socket } })
    }

    /// Returns what `Hello` says of it.
    pub(crate) fn invitation(&self) -> Invitation {
        self.invitation.clone()
    }

    /// Waits for a pool that can be mapped, and reached from ours where it is on a card. Who passes something else is told what is wrong with it.
    pub(crate) async fn receive(&self, key: &LinkKey, ours: Option<&Arc<dyn Backing>>) -> Remote {
        loop {
            let received = match self.listener.accept().await {
                Ok((stream, _)) => timeout(SHARE_LIMIT, Remote::receive(stream, key, ours)).await,
                Err(error) => Ok(Err(error)),
            };
            match received {
                Ok(Ok(remote)) => return remote,
                Ok(Err(error)) => tracing::warn!(%error, "receive the target's pool"),
                Err(_) => tracing::warn!("receive the target's pool: it took longer than {SHARE_LIMIT:?}"),
            }
        }
    }
}

/// What is passed beside the files.
#[derive(Debug, Serialize, Deserialize)]
struct Passed {
    layout: PageLayout,
    /// Where its pages are, which the source is to write there.
    direct: Option<String>,
    /// Whether only what passes through the file is ever there.
    sparse: bool,
}

/// Source: the target's pool, mapped, and the socket on which to say that it no longer is. Without a pool where the target wants
/// the word alone: UCX maps pools by itself.
#[derive(Debug)]
pub(crate) struct Remote {
    pool: Option<(Pages, Arc<Words>)>,
    direct: Option<Arc<dyn Reach>>,
    sparse: bool,
    /// What was asked of a card may still be done.
    stays: AtomicBool,
    socket: std::os::unix::net::UnixStream,
}

impl Remote {
    async fn receive(mut stream: UnixStream, key: &LinkKey, ours: Option<&Arc<dyn Backing>>) -> io::Result<Self> {
        check_user(&stream)?;
        let mut bytes = vec![0; MOST_PASSED];
        let received = stream.async_io(Interest::READABLE, || system::receive_files(stream.as_fd(), &mut bytes)).await;
        let checked = received.and_then(|(length, files)| match bytes[..length].split_first_chunk() {
            Some((proof, passed)) if key.check(Claim::Pool, &Proof(*proof)) => Ok((passed, files)),
            _ => Err(io::Error::new(ErrorKind::PermissionDenied, "it is not from the worker that was dialled")),
        });
        let mapped = checked.and_then(|(passed, files)| {
            let Some(passed): Option<Passed> = serde_json::from_slice(passed)? else { return Ok(None) };
            if !files.iter().all(system::is_sealed) {
                return Err(io::Error::other("its size could change"));
            }
            let [pool, words] = files;
            let words = Arc::new(Words::map(&words, passed.layout.pages)?);
            let pages = Pages::map_foreign(&pool, passed.layout).map_err(io::Error::other)?;
            Ok(Some((pages, words, passed.direct, passed.sparse)))
        });
        let reached = match mapped {
            Ok(Some((pages, words, shared, sparse))) => {
                reach(ours.cloned(), shared).await.map(|direct| (Some((pages, words)), direct, sparse))
            }
            Ok(None) => Ok((None, None, false)),
            Err(error) => Err(error),
        };
        match reached {
            Ok((pool, direct, sparse)) => {
                stream.write_all(&[MAPPED]).await?;
                Ok(Self { pool, direct, sparse, stays: AtomicBool::new(false), socket: stream.into_std()? })
            }
            Err(error) => {
                stream.write_all(error.to_string().as_bytes()).await?;
                Err(error)
            }
        }
    }

    fn passed(&self) -> &(Pages, Arc<Words>) {
        self.pool.as_ref().expect("links start with a pool, and it is taken only when dropped")
    }

    /// Returns the pool's layout, where it was passed.
    pub(crate) fn layout(&self) -> Option<&PageLayout> {
        self.pool.as_ref().map(|(pages, _)| pages.layout())
    }
}

/// Reaches the pages of which a target told, if it did.
async fn reach(ours: Option<Arc<dyn Backing>>, shared: Option<String>) -> io::Result<Option<Arc<dyn Reach>>> {
    let Some(shared) = shared else { return Ok(None) };
    let ours = ours.ok_or_else(|| io::Error::other("these pages are on no card"))?;
    // A driver takes its time.
    let reached = tokio::task::spawn_blocking(move || ours.reach(&shared)).await;
    reached.map_err(io::Error::other)?.map(Some).map_err(io::Error::other)
}

impl Writable for Remote {
    fn direct(&self) -> Option<&dyn Reach> {
        self.direct.as_deref()
    }

    fn never_leaves(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    fn is_touched(&self) -> bool {
        !self.sparse
    }
}

impl AsRef<Pages> for Remote {
    fn as_ref(&self) -> &Pages {
        &self.passed().0
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // In this order. A target that does not get the word waits for the end of this process, as it must.
        (self.pool, self.direct) = (None, None);
        if *self.stays.get_mut() {
            return;
        }
        if let Err(error) = self.socket.write_all(&[UNMAPPED]) {
            tracing::debug!(%error, "say that the target's pool is unmapped");
        }
    }
}

/// Target: its pool, as it can be passed on.
#[derive(Debug)]
pub(crate) struct Shared {
    file: File,
    words: (Arc<Words>, File),
    layout: PageLayout,
    /// Where the pages are, if not in the file.
    backing: Option<Arc<dyn Backing>>,
    host: String,
    allocated: Once,
}

impl Shared {
    /// Returns how to pass the pool in `file`, or why it cannot be.
    pub(crate) fn of(file: &File, layout: &PageLayout, backing: Option<Arc<dyn Backing>>) -> io::Result<Arc<Self>> {
        let host = system::host().ok_or_else(|| io::Error::other("this host has no boot id"))?;
        if !system::is_sealed(file) {
            return Err(io::Error::other("the page pool is no sealed memory file"));
        }
        let words = system::sealed_file("kv-words", Words::bytes(layout.pages))?;
        let words = (Arc::new(Words::map(&words, layout.pages)?), words);
        let (file, layout) = (file.try_clone()?, layout.clone());
        Ok(Arc::new(Self { file, words, layout, backing, host, allocated: Once::new() }))
    }

    /// Returns the words of the pool's pages.
    pub(crate) fn words(&self) -> &Arc<Words> {
        &self.words.0
    }

    /// Returns the host whose processes it can be passed to.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Passes the pool to the source that invites, with its pages on cards where it is to write these `directly`. From here on it may write.
    pub(crate) async fn pass(
        self: &Arc<Self>,
        invitation: &Invitation,
        key: &LinkKey,
        directly: bool,
    ) -> io::Result<Writer> {
        let direct = match &self.backing {
            Some(backing) if directly => Some(backing.share().map_err(io::Error::other)?),
            _ => None,
        };
        let passed = Passed { layout: self.layout.clone(), direct, sparse: self.backing.is_some() };
        let writer = pass((invitation, key), Some(&passed), [&self.file, &self.words.1]).await?;
        if self.backing.is_none() {
            self.allocate();
        }
        Ok(writer)
    }

    /// Takes the whole pool from the system, once, in the background.
    fn allocate(self: &Arc<Self>) {
        self.allocated.call_once(|| {
            let shared = Arc::downgrade(self);
            let bytes = self.layout.pool_bytes();
            let allocate = move || {
                for at in (0..bytes).step_by(STEP_BYTES) {
                    // Gone when the worker stopped meanwhile.
                    let Some(shared) = shared.upgrade() else { return };
                    if let Err(error) = system::allocate(&shared.file, at as u64, STEP_BYTES.min(bytes - at) as u64) {
                        return tracing::warn!(%error, at, bytes, "take the page pool from the system");
                    }
                }
            };
            if let Err(error) = thread::Builder::new().name("kv-allocate".into()).spawn(allocate) {
                tracing::warn!(%error, "take the page pool from the system");
            }
        });
    }
}

/// Says whether `invitation` comes from this host.
pub(crate) fn is_here(invitation: &Invitation) -> bool {
    system::host().is_some_and(|host| host == invitation.host)
}

/// Target: watches a source of this host that maps the pool by other means, and will say when it no longer does.
pub(crate) async fn watch(invitation: &Invitation, key: &LinkKey) -> io::Result<Writer> {
    let nothing = File::open("/dev/null")?;
    pass((invitation, key), None, [&nothing; 2]).await
}

async fn pass(to: (&Invitation, &LinkKey), passed: Option<&Passed>, files: [&File; 2]) -> io::Result<Writer> {
    let late = |_| io::Error::new(ErrorKind::TimedOut, format!("the source did not answer within {SHARE_LIMIT:?}"));
    timeout(SHARE_LIMIT, pass_slowly(to, passed, files)).await.map_err(late)?
}

async fn pass_slowly(
    (invitation, key): (&Invitation, &LinkKey),
    passed: Option<&Passed>,
    files: [&File; 2],
) -> io::Result<Writer> {
    let mut stream = UnixStream::connect(format!("\0{}", invitation.socket)).await?;
    check_user(&stream)?;
    // Before its answer, so that the process that answers is the one that is watched.
    let process = system::process_of(stream.as_fd(), stream.peer_cred()?.pid())?;
    // SAFETY: the descriptor is owned by what registers it, and so open for as long as it is registered.
    let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
    let mut bytes = key.prove(Claim::Pool).0.to_vec();
    serde_json::to_writer(&mut bytes, &passed)?;
    if bytes.len() > MOST_PASSED {
        return Err(io::Error::other(format!("{} bytes say where pages are, and {MOST_PASSED} are read", bytes.len())));
    }
    stream.async_io(Interest::WRITABLE, || system::send_files(stream.as_fd(), &bytes, files)).await?;
    let mut answer = [0; 256];
    match stream.read(&mut answer).await? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ if answer[0] == MAPPED => Ok(Writer { process, stream }),
        length => Err(io::Error::other(format!("the source says: {}", answer[..length].escape_ascii()))),
    }
}

/// Target: a source that may write its pages.
#[derive(Debug)]
pub(crate) struct Writer {
    process: AsyncFd<OwnedFd>,
    stream: UnixStream,
}

impl Writer {
    /// Waits for proof that it no longer can. Returns which.
    pub(crate) async fn gone(mut self) -> &'static str {
        let word = async {
            let mut word = [0];
            match self.stream.read(&mut word).await {
                Ok(1) if word[0] == UNMAPPED => {}
                // It closed, or says what it should not: no proof of anything.
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = word => "the source unmapped the pool",
            ready = self.process.readable() => match ready {
                Ok(_) => "the source's process is gone",
                // Cannot be while the reactor runs; and when it does not, nobody is left to be told.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// Refuses a process of another user, unless that is root, who can do anything anyway.
fn check_user(stream: &UnixStream) -> io::Result<()> {
    let (theirs, ours) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
    if theirs == ours || theirs == 0 {
        return Ok(());
    }
    let reason = format!("user: theirs {theirs}, ours {ours}");
    Err(io::Error::new(ErrorKind::PermissionDenied, reason))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::testing::{contents, key, layout, pool, pool_with_seals, sealed_pool};
    use kv_cache::{Extent, PageId};
    use rustix::fs::SealFlags;
    use std::os::unix::fs::FileExt;

    async fn passed(file: &File, layout: &PageLayout) -> (Writer, Remote) {
        let (shared, door) = (Shared::of(file, layout, None).expect("can be shared"), Door::open().expect("door"));
        let invitation = door.invitation();
        let (writer, remote) = tokio::join!(shared.pass(&invitation, key(), false), door.receive(key(), None));
        (writer.expect("passed"), remote)
    }

    #[tokio::test]
    async fn a_pool_is_passed_and_written_and_its_end_is_told() {
        let layout = layout(2, 6);
        let file = sealed_pool(&layout);
        let (writer, remote) = passed(&file, &layout).await;
        let block = Extent { offset: layout.block_offset(1, PageId(3)), bytes: layout.block_bytes() };
        // SAFETY: this test is the only user of the pool.
        unsafe { remote.as_ref().bytes_mut(block) }.fill(7);
        let mut expected = vec![0; layout.pool_bytes()];
        expected[block.offset..block.offset + block.bytes].fill(7);
        assert!(contents(&file, &layout) == expected);
        drop(remote);
        assert_eq!(writer.gone().await, "the source unmapped the pool");
    }

    /// Someone else's end of the socket.
    async fn stranger() -> (Invitation, UnixListener) {
        let Door { listener, invitation } = Door::open().expect("door");
        (invitation, listener)
    }

    #[tokio::test]
    async fn a_closed_socket_proves_nothing() {
        let layout = layout(1, 1);
        let shared = Shared::of(&sealed_pool(&layout), &layout, None).expect("can be shared");
        let (invitation, listener) = stranger().await;
        let source = async {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut bytes = [0; 4096];
            let received = stream.async_io(Interest::READABLE, || system::receive_files(stream.as_fd(), &mut bytes));
            let (_, files) = received.await.expect("received");
            stream.write_all(&[MAPPED]).await.expect("answer");
            files
        };
        let (writer, _files) = tokio::join!(shared.pass(&invitation, key(), false), source);
        timeout(Duration::from_millis(100), writer.expect("passed").gone()).await.expect_err("this process lives");
    }

    #[tokio::test]
    async fn who_does_not_answer_gets_nothing() {
        let layout = layout(1, 1);
        let shared = Shared::of(&sealed_pool(&layout), &layout, None).expect("can be shared");
        let (mut invitation, listener) = stranger().await;
        let error = shared.pass(&invitation, key(), false).await.expect_err("silent").to_string();
        assert_eq!(error, "the source did not answer within 800ms");
        let hang_up = async { drop(listener.accept().await) };
        // The first connection still waits to be accepted.
        hang_up.await;
        let (error, ()) = tokio::join!(shared.pass(&invitation, key(), false), async { drop(listener.accept().await) });
        assert!(error.is_err());
        invitation.socket = "baton-kv-nobody".into();
        let error = shared.pass(&invitation, key(), false).await.expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }

    /// What a target passes that cannot be mapped is refused, and the target told why; the next good one is taken.
    #[tokio::test]
    async fn a_pool_that_could_be_cut_off_is_refused() {
        let layout = layout(1, 2);
        let bytes = layout.pool_bytes();
        let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let plain = pool(&layout);
        let cases = [
            (pool_with_seals(bytes, SealFlags::GROW | SealFlags::SEAL), "its size could change"),
            (pool_with_seals(bytes, SealFlags::SHRINK | SealFlags::GROW), "its size could change"),
            (pool_with_seals(bytes, all | SealFlags::WRITE), "its size could change"),
            (plain, "its size could change"),
            (pool_with_seals(bytes - 1, all), "the pool file has"),
        ];
        let door = Door::open().expect("door");
        let invitation = door.invitation();
        let target = async {
            for (file, reason) in cases {
                let host = system::host().expect("a host");
                let words = system::sealed_file("words", Words::bytes(2)).expect("memory");
                let words = (Arc::new(Words::map(&words, 2).expect("map")), words);
                let shared =
                    Shared { file, words, layout: layout.clone(), backing: None, host, allocated: Once::new() };
                let error = Arc::new(shared).pass(&invitation, key(), false).await.expect_err(reason).to_string();
                assert!(error.contains(reason), "{error}");
            }
            Shared::of(&sealed_pool(&layout), &layout, None)
                .expect("can be shared")
                .pass(&invitation, key(), false)
                .await
                .expect("passed")
        };
        let (_writer, remote) = tokio::join!(target, door.receive(key(), None));
        assert_eq!(*remote.as_ref().layout(), layout);
        let error = Shared::of(&pool(&layout), &layout, None).expect_err("a plain file").to_string();
        assert_eq!(error, "the page pool is no sealed memory file");
    }

    #[tokio::test]
    async fn the_whole_pool_is_taken_when_it_is_first_passed() {
        use std::os::unix::fs::MetadataExt;
        let layout = layout(4, 4_000);
        let file = sealed_pool(&layout);
        file.write_all_at(&[9], 5).expect("write");
        let (shared, door) = (Shared::of(&file, &layout, None).expect("can be shared"), Door::open().expect("door"));
        assert!(file.metadata().expect("metadata").blocks() <= 8);
        let invitation = door.invitation();
        let (_writer, _remote) = tokio::join!(shared.pass(&invitation, key(), false), door.receive(key(), None));
        let settled = async {
            while file.metadata().expect("metadata").blocks() * 512 < layout.pool_bytes() as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), settled).await.expect("taken");
        let mut bytes = [0; 7];
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(bytes, [0, 0, 0, 0, 0, 9, 0], "what was there stays");
    }

    /// A child would keep the target's pages writable after the source's process is gone.
    #[tokio::test]
    async fn children_do_not_inherit_the_map() {
        let layout = layout(2, 6);
        let (_writer, remote) = passed(&sealed_pool(&layout), &layout).await;
        // SAFETY: only the address is used.
        let start = unsafe { remote.as_ref().bytes(Extent { offset: 0, bytes: 1 }) }.as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("maps");
        let ours = maps.lines().skip_while(|line| !line.starts_with(&format!("{start:x}-")));
        let flags = ours.skip(1).find(|line| line.starts_with("VmFlags:")).expect("flags");
        assert!(flags.split(' ').any(|flag| flag == "dc"), "{flags}");
    }
}
