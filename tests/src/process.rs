//! Real `baton` processes, killed when the test ends.

use crate::Client;
use std::{
    fs::File,
    io::Read,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Returns the `baton` binary built beside this test.
///
/// # Panics
/// When it has not been built: `make test` does that first.
pub fn baton_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let binary = test.parent().and_then(Path::parent).expect("tests run from target/<profile>/deps").join("baton");
    assert!(binary.exists(), "{} is not built; run `cargo build -p baton` first", binary.display());
    binary
}

/// Returns a loopback address whose port was free a moment ago.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("loopback has free ports")
}

/// A running `baton` with its output in a file.
#[derive(Debug)]
pub struct Baton {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Baton {
    /// Starts `baton` with `arguments`; nothing of the test's own environment reaches its settings.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(arguments, &[])
    }

    /// The same with `variables` in its environment.
    pub fn start_in(arguments: &[&str], variables: &[(&str, &Path)]) -> Self {
        let log = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        let output = |file: &File| Stdio::from(file.try_clone().expect("a file handle can be cloned"));
        let child = Command::new(baton_binary())
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(output(log.as_file()))
            .stderr(output(log.as_file()))
            .spawn()
            .expect("baton starts");
        Self { child, log }
    }

    /// Returns what it has printed so far.
    pub fn output(&self) -> String {
        let mut text = String::new();
        File::open(self.log.path()).and_then(|mut file| file.read_to_string(&mut text)).expect("its log can be read");
        text
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process has exited by itself. Returns its code and all it printed.
    ///
    /// # Panics
    /// When it has not exited after `limit`.
    pub async fn exit(mut self, limit: Duration) -> (Option<i32>, String) {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return (status.code(), self.output());
            }
            assert!(Instant::now() < deadline, "still running after {limit:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a signal by name, for example `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {}", self.id());
    }

    /// Waits until `probe` of `client` answers 200.
    ///
    /// # Panics
    /// When it does not within `limit`, or the process ends before; shows what it printed.
    pub async fn ready(&mut self, client: &Client, probe: &str, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            if client.get(probe).await.is_ok_and(|answer| answer.status == 200) {
                return;
            }
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "exited with {ended:?}:\n{}", self.output());
            assert!(Instant::now() < deadline, "{probe} is not 200 after {limit:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

impl Drop for Baton {
    fn drop(&mut self) {
        // It may have exited already; either way nothing of it is left afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
