//! A real etcd for tests: one process on loopback with a data directory of its own, which a test may kill, pause, empty and
//! start again.
//!
//! Used by the system tests and, by path, by the tests of the crate `cluster`, which the system tests stand above.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

/// How long etcd may take to answer after a start. It elects itself after a second; the rest is for busy machines.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running etcd, killed on drop.
#[derive(Debug)]
pub struct Etcd {
    binary: PathBuf,
    data: tempfile::TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

impl Etcd {
    /// Starts an etcd and waits until it serves.
    ///
    /// # Panics
    /// When no etcd is installed (`tests/servers/install.sh` does that) or it does not come up.
    pub fn start() -> Self {
        let mut etcd = Self::reserve();
        etcd.restart();
        etcd
    }

    /// Chooses the address of an etcd that is not started yet.
    pub fn reserve() -> Self {
        let data = tempfile::Builder::new().prefix("baton-etcd-").tempdir().expect("the temporary folder is writable");
        Self { binary: binary(), data, client: free_address(), peer: free_address(), process: None }
    }

    /// Returns the endpoint for clients, `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.client)
    }

    /// Starts it (again) at the same address with whatever data there is, and waits until it serves.
    pub fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.wait_until_serving();
    }

    /// Starts it (again) without waiting.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "it is running");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("the temporary folder is writable");
        let stdout = log.try_clone().expect("the log is an ordinary file");
        let client = self.endpoint();
        let peer = format!("http://{}", self.peer);
        let process = Command::new(&self.binary)
            .env_clear()
            .arg(format!("--data-dir={}", self.data.path().join("data").display()))
            .args(["--name=test", "--logger=zap"])
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.binary.display()));
        self.process = Some(process);
    }

    /// Kills it with SIGKILL, as a power cut would; does nothing when it is not running.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself; what counts is that it is gone.
            let _ = process.kill();
            process.wait().expect("it is our child");
        }
    }

    /// Throws its data away. It must not be running.
    pub fn wipe(&mut self) {
        assert!(self.process.is_none(), "kill it first");
        std::fs::remove_dir_all(self.data.path().join("data")).expect("the data directory is ours");
    }

    /// Stops it in its tracks (SIGSTOP): connections stay open, nothing answers.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets it go on after [`Etcd::pause`].
    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let process = self.process.as_ref().expect("it is running");
        let status = Command::new("/bin/sh").args(["-c", &format!("kill -{name} {}", process.id())]).status();
        assert!(status.is_ok_and(|status| status.success()), "send SIG{name} to etcd");
    }

    fn log(&self) -> PathBuf {
        self.data.path().join("log")
    }

    /// Asks `/health` until it says so. Blocking: a test has nothing else to do meanwhile.
    fn wait_until_serving(&mut self) {
        let deadline = Instant::now() + START_TIMEOUT;
        while !healthy(self.client) {
            let ended = self.process.as_mut().expect("just started").try_wait().expect("it is our child");
            if ended.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.log()).unwrap_or_default();
                panic!("etcd does not serve (exit: {ended:?}); its log:\n{log}");
            }
            // A pause between two questions; the connection's own time limit does not bound a refusal.
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Finds etcd: where `tests/servers/install.sh` puts it, or in the search path.
fn binary() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository");
    let installed = root.join(".test-servers/bin/etcd");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::iter::once(installed).chain(std::env::split_paths(&path).map(|folder| folder.join("etcd")));
    candidates
        .into_iter()
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("this test needs etcd and there is none: run tests/servers/install.sh"))
}

/// Returns a loopback address nobody listens at.
///
/// Not port 0: the port must stay the same over restarts, and one from the ephemeral range could meanwhile become the source
/// port of any connection, even of one to itself. So the ports are taken from below that range, starting at a place that differs
/// between test processes.
fn free_address() -> SocketAddr {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % u32::from(COUNT / 16)) as u16 * 16;
    for _ in 0..COUNT {
        let port = FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no free port below the ephemeral range");
}

/// Asks etcd's health page.
fn healthy(address: SocketAddr) -> bool {
    use std::io::{Read, Write};
    let limit = Duration::from_millis(500);
    let Ok(mut stream) = TcpStream::connect_timeout(&address, limit) else { return false };
    let mut answer = String::new();
    let asked = stream
        .set_read_timeout(Some(limit))
        .and_then(|()| stream.write_all(b"GET /health HTTP/1.0\r\n\r\n"))
        .and_then(|()| stream.read_to_string(&mut answer));
    asked.is_ok() && answer.contains("\"health\":\"true\"")
}
