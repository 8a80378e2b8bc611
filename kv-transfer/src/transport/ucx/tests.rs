use super::{
    handles::{Endpoint, Memory, Worker},
    *,
};
use crate::{
    handoffs::Moved,
    inbox::{Inbox, Note},
    mover::Movers,
    plan::Piece,
    source::Frame,
    testing::{contents, fill, key, layout, pool},
    transport::shm::{self, Door, Writer},
};
use kv_cache::{PageId, PageLayout};
use std::{fs::File, os::unix::fs::MetadataExt, time::Duration};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// UCX as tests/servers/install.sh unpacks it, or the system's; `None`, said aloud, where there is none with a transport of `tls`.
pub(crate) fn config(tls: &str) -> Option<UcxConfig> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-servers/ucx/lib/libucp.so.0");
    let config = UcxConfig { library: unpacked.exists().then_some(unpacked), tls: Some(tls.into()) };
    match survey(&config) {
        Ok(found) if found.resources.is_empty() => eprintln!("skipped: UCX connects by none of {tls} here"),
        Ok(_) => return Some(config),
        Err(error) => eprintln!("skipped: no UCX here (tests/servers/install.sh): {error}"),
    }
    None
}

struct End {
    ucx: Ucx,
    layout: PageLayout,
    pool: Arc<Pages>,
    file: File,
    _memory: Option<UcxMemory>,
}

async fn end(config: &UcxConfig, pages: u32, byte: u8, allocate: bool) -> End {
    let layout = layout(3, pages);
    let memory = allocate.then(|| UcxMemory::new(config, layout.pool_bytes()).expect("allocated"));
    let file =
        memory.as_ref().map_or_else(|| pool(&layout), |memory| memory.file().try_clone().expect("the same file"));
    fill(&file, &vec![byte; layout.pool_bytes()]);
    let pool = Arc::new(Pages::map(&file, layout.clone()).expect("map"));
    let ucx = timeout(SOON, Ucx::start(config, pool.clone(), &file)).await.expect("in time").expect("UCX starts");
    End { ucx, layout, pool, file, _memory: memory }
}

struct Pair {
    from: End,
    to: End,
    source: Arc<dyn Transport>,
    /// What the target watches the source by, and the threads that copy, where the pool may be mapped.
    watched: Option<(Writer, Movers)>,
    stop: LinkStop,
    inbox: Arc<Inbox>,
    said: mpsc::Receiver<Message>,
}

/// `allocate`: UCX allocates the pools. `watch`: the target watches the source.
async fn pair(config: &UcxConfig, allocate: bool, watch: bool) -> Pair {
    let (from, to) = (end(config, 8, 1, allocate).await, end(config, 12, 9, allocate).await);
    let (mut word, mut watched) = (None, None);
    if watch {
        let door = Door::open().expect("door");
        let invitation = door.invitation();
        let (writer, remote) = tokio::join!(shm::watch(&invitation, key()), door.receive(key(), None));
        (word, watched) = (Some(remote), Some((writer.expect("watched"), Movers::start(2).expect("threads"))));
    }
    let window = timeout(SOON, to.ucx.accept(7)).await.expect("in time").expect("a worker");
    let (stop, inbox) = (LinkStop::default(), Arc::default());
    let (say, said) = mpsc::channel(16);
    let terms = Terms::same(&from.layout, &to.layout);
    let path = LinkPath { terms: terms.clone(), digest: false, emulated: true, say: say.clone() };
    let connect = async {
        let mut opening = from.ucx.open(window, path, word, &stop).await?;
        to.ucx.meet(7, std::mem::take(&mut opening.address)).await?;
        opening.connect().await
    };
    let way = timeout(SOON, connect).await.expect("in time").expect("connected");
    let source: Arc<dyn Transport> = match (way, &watched) {
        (Way::Puts(source), _) => Arc::new(source),
        (Way::Map(mapped), Some((_, movers))) => {
            let path = shm::Path { pool: from.pool.clone(), terms, digest: false, say };
            Arc::new(shm::start(mapped, &path, movers, &stop))
        }
        (Way::Map(_), None) => panic!("nobody watches who writes"),
    };
    Pair { from, to, source, watched, stop, inbox, said }
}

impl Pair {
    fn post(&self, sequence: u32, landing: &[u32]) {
        let pages = [5, 6, 1].map(PageId).as_slice().into();
        let landing = landing.iter().copied().map(PageId).collect();
        let pieces = vec![Piece { layer: 1, pages: 0..3 }, Piece { layer: 2, pages: 1..2 }];
        let frame = Frame { handoff: HandoffId(3), sequence, pieces, pages, landing };
        let bytes = 4 * self.from.layout.block_bytes() as u64;
        self.source.post(Job::new(frame, bytes, self.inbox.clone(), Arc::default()));
    }

    async fn moved(&self) -> Moved {
        let mut notes = Vec::new();
        timeout(SOON, self.inbox.take(&mut notes)).await.expect("in time");
        assert_eq!(notes.len(), 1, "{notes:?}");
        match notes.remove(0).1 {
            Note::Moved(HandoffId(3), moved) => moved,
            other => panic!("{other:?}"),
        }
    }
}

/// Every byte lands where it should and no other changes, before the source says anything. Returns the pair, closed.
async fn lands(tls: &str, allocate: bool, watch: bool) -> Option<Pair> {
    let mut pair = pair(&config(tls)?, allocate, watch).await;
    let noise: Vec<u8> = (0..pair.from.layout.pool_bytes()).map(|at| (at * 7 + at / 251) as u8).collect();
    fill(&pair.from.file, &noise);
    pair.post(0, &[2, 3, 11]);
    assert!(matches!(pair.moved().await, Moved::Sent { sequence: 0, .. }));
    let mut expected = vec![9; pair.to.layout.pool_bytes()];
    for (layer, from, to) in [(1, 5, 2), (1, 6, 3), (1, 1, 11), (2, 6, 3)] {
        let bytes = pair.from.layout.block_bytes();
        let (from, to) =
            (pair.from.layout.block_offset(layer, PageId(from)), pair.to.layout.block_offset(layer, PageId(to)));
        expected[to..to + bytes].copy_from_slice(&noise[from..from + bytes]);
    }
    assert!(contents(&pair.to.file, &pair.to.layout) == expected);
    assert!(matches!(pair.said.recv().await, Some(Message::Pages { sequence: 0, .. })));

    pair.source.close();
    pair.post(1, &[2, 3, 11]);
    assert!(matches!(pair.moved().await, Moved::Lost), "closed");
    timeout(SOON, pair.to.ucx.release(7)).await.expect("in time");
    Some(pair)
}

#[tokio::test]
async fn puts_land_over_posix() {
    lands("posix", false, false).await;
}

/// Without a word to say that a map is gone, none is used.
#[tokio::test]
async fn puts_land_in_memory_of_ucx() {
    lands("posix", true, false).await;
}

#[tokio::test]
async fn puts_land_over_tcp() {
    lands("tcp", false, true).await;
}

/// Returns the regions of this process that map `file`.
fn maps_of(file: &File) -> Vec<String> {
    let inode = format!(" {} ", file.metadata().expect("metadata").ino());
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines()
        .filter(|line| line.contains(&inode))
        .map(|line| line.split('-').next().unwrap_or(line).to_owned())
        .collect()
}

/// What UCX maps is written without UCX, and the target hears when it no longer can be.
#[tokio::test]
async fn a_mapped_pool_is_written_and_its_end_is_told() {
    let Some(pair) = lands("posix", true, true).await else { return };
    let (writer, _movers) = pair.watched.expect("watched");
    // Frames were written by the copiers: without them there is nobody who could write.
    drop(pair.source);
    assert_eq!(timeout(SOON, writer.gone()).await.expect("told"), "the source unmapped the pool");
    // The target's own: UCX's, that of its file for the engine, and ours.
    assert_eq!(maps_of(&pair.to.file).len(), 2, "{:?}", maps_of(&pair.to.file));
}

/// A source whose UCX ends first keeps its map for as long as somebody may write there.
#[tokio::test]
async fn a_map_outlives_what_made_it() {
    let Some(config) = config("posix") else { return };
    let Pair { from, to, source, watched, inbox: _inbox, .. } = pair(&config, true, true).await;
    let before = maps_of(&to.file).len();
    let End { ucx, .. } = from;
    drop(ucx);
    let (writer, _movers) = watched.expect("watched");
    let told = timeout(Duration::from_millis(100), writer.gone());
    told.await.expect_err("it is still mapped");
    assert_eq!(maps_of(&to.file).len(), before);
    source.close();
    let unmapped = async {
        while maps_of(&to.file).len() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(SOON, unmapped).await.expect("unmapped");
}

/// The target's worker is destroyed under the source: its frames come back as lost, and the link ends.
#[tokio::test]
async fn a_destroyed_worker_ends_the_link() {
    let Some(config) = config("tcp") else { return };
    let pair = pair(&config, false, false).await;
    pair.post(0, &[2, 3, 11]);
    assert!(matches!(pair.moved().await, Moved::Sent { .. }));
    timeout(SOON, pair.to.ucx.release(7)).await.expect("in time");
    let before = contents(&pair.to.file, &pair.to.layout);
    for sequence in 1..10_000 {
        // When the source hears of it is its own affair.
        pair.post(sequence, &[4, 5, 6]);
        tokio::select! {
            moved = pair.moved() => assert!(matches!(moved, Moved::Sent { .. }), "nothing is lost before the link has ended"),
            () = pair.stop.token().cancelled() => break,
        }
    }
    pair.source.close();
    pair.post(10_000, &[4, 5, 6]);
    let mut notes = Vec::new();
    while !notes.iter().any(|(_, note)| matches!(note, Note::Moved(_, Moved::Lost))) {
        notes.clear();
        timeout(SOON, pair.inbox.take(&mut notes)).await.expect("in time");
    }
    assert!(pair.stop.reason().starts_with("UCX: "), "{}", pair.stop.reason());
    assert!(contents(&pair.to.file, &pair.to.layout) == before, "nothing lands without a worker");
}

/// Under the numbers of descriptors that a destroyed worker had, its process may hold other files: a source that has begun to connect
/// writes into none of them.
#[test]
fn who_connects_too_late_writes_into_no_other_file() {
    let Some(config) = config("posix") else { return };
    let _inside = ucx_sys::enter();
    let (from, to) = (open(&config).expect("opened"), open(&config).expect("opened"));
    let memory = Memory::allocate(&to, 4096).expect("allocated");
    let worker = Worker::new(&to).expect("a worker");
    let address = worker.address().expect("its address");
    let source = Worker::new(&from).expect("a worker");
    let endpoint = Endpoint::connect(source, &address, memory.key().ok().as_deref()).expect("connects");
    drop(worker);
    let layout = layout(3, 1_000);
    let others: Vec<File> = (0..32).map(|_| pool(&layout)).collect();
    // How it ends is UCX's affair: the control connection knows that nobody is there.
    let _ = endpoint.probe(memory.address() as u64);
    (0..100).for_each(|_| _ = endpoint.worker().progress());
    assert!(
        others.iter().all(|file| contents(file, &layout).iter().all(|byte| *byte == 0)),
        "another file was written"
    );
}

/// A source that goes while it connects, at any point of that, leaves the target's process as it was.
#[test]
fn a_target_outlives_who_is_gone_before_it_answers() {
    for tls in ["posix", "tcp", "posix,tcp"] {
        let Some(config) = config(tls) else { continue };
        let _inside = ucx_sys::enter();
        let to = open(&config).expect("opened");
        let memory = Memory::allocate(&to, 4096).expect("allocated");
        let key = memory.key().expect("a key");
        // Gone before it is met, too.
        let gone = Worker::new(&to).expect("a worker").address().expect("its address");
        let alone = Endpoint::connect(Worker::new(&to).expect("a worker"), &gone, None);
        alone.iter().for_each(|alone| (0..200).for_each(|_| _ = alone.worker().progress()));
        for seed in 0..100 {
            let from = open(&config).expect("opened");
            let target = Worker::new(&to).expect("a worker");
            let source = Worker::new(&from).expect("a worker");
            let address = target.address().expect("its address");
            let met = Endpoint::connect(target, &source.address().expect("its address"), None).expect("connects");
            let endpoint = Endpoint::connect(source, &address, Some(&key)).expect("connects");
            let target = met.worker();
            let _ = endpoint.probe(memory.address() as u64);
            for step in 0..seed % 10 {
                endpoint.worker().progress();
                if (seed / 10) >> (step % 4) & 1 == 1 {
                    target.progress();
                }
            }
            drop(endpoint);
            drop(from);
            (0..200).for_each(|_| _ = target.progress());
        }
    }
}

/// A landing outside the target's pool never reaches UCX.
#[tokio::test]
async fn pages_outside_the_pool_are_not_written() {
    let Some(config) = config("posix") else { return };
    let pair = pair(&config, false, false).await;
    pair.post(0, &[2, 12, 3]);
    assert!(matches!(pair.moved().await, Moved::Lost));
    timeout(SOON, pair.stop.token().cancelled()).await.expect("in time");
    assert_eq!(pair.stop.reason(), "UCX: landing page 12 of a pool of 12");
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let Some(config) = config("posix") else { return };
    let layout = layout(3, 4);
    let file = pool(&layout);
    let pool = Arc::new(Pages::map(&file, layout).expect("map"));
    let start = |config: UcxConfig| {
        let (pool, file) = (pool.clone(), &file);
        async move { timeout(SOON, Ucx::start(&config, pool, file)).await.expect("in time").expect_err("no") }
    };
    let reason = start(UcxConfig { tls: Some("nonsense".into()), ..config.clone() }).await;
    assert!(reason.contains("No such device"), "{reason}");
    let reason = start(UcxConfig { library: Some("/elsewhere/libucp.so.0".into()), ..config }).await;
    assert!(reason.starts_with("/elsewhere/libucp.so.0 cannot be loaded"), "{reason}");
}

#[test]
fn a_survey_lists_what_ucx_finds() {
    for tls in ["posix", "tcp"] {
        let Some(config) = config(tls) else { continue };
        let survey = survey(&config).expect("a survey");
        assert!(survey.resources.iter().all(|resource| resource.starts_with(&format!("{tls}/"))), "{survey:?}");
        assert!(survey.version >= (1, 13, 0));
    }
}

#[test]
fn windows_are_bounded_text() {
    let window = Window { address: vec![0, 255, 16], key: vec![], base: 1 << 47 };
    let text = serde_json::to_string(&window).expect("text");
    assert_eq!(text, r#"{"address":"00ff10","key":"","base":140737488355328}"#);
    assert_eq!(serde_json::from_str::<Window>(&text).expect("read"), window);
    let long = "0".repeat(2 * LONGEST_NAME + 2);
    for (address, problem) in
        [("0", "in pairs"), ("0g", "not hexadecimal"), ("é", "not hexadecimal"), (&long, "at most 8192")]
    {
        let text = format!(r#"{{"address":"{address}","key":"","base":0}}"#);
        let error = serde_json::from_str::<Window>(&text).expect_err(address).to_string();
        assert!(error.contains(problem), "{error}");
    }
}
