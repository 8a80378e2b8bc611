//! `baton up` and `baton chat` as two terminals use them.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

/// Longest wait for a line of output.
const LINE: Duration = Duration::from_secs(60);

/// A running `baton up`, killed when the test ends.
struct Up {
    process: Child,
    lines: Receiver<String>,
}

impl Up {
    fn start() -> Self {
        let mut process = baton(&["up", "--listen", "127.0.0.1:0", "--kv-memory", "64MiB"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("baton starts");
        let stdout = BufReader::new(process.stdout.take().expect("its output is piped"));
        let (sender, lines) = channel();
        // Ends with the process, whose output it reads.
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { process, lines }
    }

    /// Waits for a line that holds `words`, and returns it.
    fn line(&self, words: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(LINE).unwrap_or_else(|_| panic!("no line with {words:?}"));
            if line.contains(words) {
                return line;
            }
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It may have ended already; either way nothing of it is left afterwards.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn baton(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.env_clear().args(args).stdin(Stdio::null());
    command
}

fn chat(args: &[&str], input: &str) -> Output {
    let mut process = baton(&[&["chat"], args].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("baton starts");
    let mut stdin = process.stdin.take().expect("its input is piped");
    stdin.write_all(input.as_bytes()).expect("chat reads its input");
    drop(stdin);
    process.wait_with_output().expect("chat ends with its input")
}

#[test]
fn a_conversation_through_pipes_and_a_drain() {
    let mut up = Up::start();
    let line = up.line("Baton is ready on http://");
    let url = line.split(' ').find(|word| word.starts_with("http://")).expect("the line holds the URL").to_owned();
    assert!(up.line("curl -N").contains(&format!("{url}/v1/chat/completions")));

    let output = chat(&["--url", &url], "What is a KV cache?\n\n/help\nWhat is prefill?\n");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("cache") && said.contains("/system") && said.contains("refill"), "{said}");

    let output = chat(&["--url", &url, "--max-tokens", "3", "--system", "Be brief."], "Tell me a story.\n");
    assert!(output.status.success() && output.stdout.len() < 60, "{:?}", output.stdout);

    let output = chat(&["--url", &url, "--model", "nope"], "hi\n");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("nope"), "{:?}", output.stderr);

    let id = up.process.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().is_ok_and(|status| status.success()));
    assert_eq!(up.process.wait().expect("baton ends").code(), Some(0));
}
