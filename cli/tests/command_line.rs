//! The binary as a shell sees it: what it refuses, and who wins when a setting is given twice.

use std::{
    io::Write,
    net::TcpListener,
    process::{Command, Output},
};

/// Runs `baton` with `args` and `environment` and nothing else, to its end.
fn baton(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.env_clear().envs(environment.iter().copied()).args(args).output().expect("baton runs")
}

/// Checks that `baton` refuses, with `status` and a message that holds every one of `parts`.
fn check_refused(args: &[&str], environment: &[(&str, &str)], status: i32, parts: &[&str]) {
    let output = baton(args, environment);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
    assert!(message.lines().any(|line| line.starts_with("error: ")), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{args:?}: {message:?} does not mention {part:?}");
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("a file that can be written");
    file
}

/// A port that is taken for as long as this lives, so that a server that tries it ends and names it.
fn taken() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let address = listener.local_addr().expect("a bound socket has an address").to_string();
    (listener, address)
}

#[test]
fn flags_win_over_the_environment_and_the_environment_over_the_file() {
    let ([_a, _b, _c], [in_file, in_environment, flag]) = three_taken();
    let config = file(&format!("listen = \"{in_file}\"\n"));
    let config = config.path().to_str().expect("a UTF-8 path");
    let environment = [("BATON_LISTEN", in_environment.as_str())];
    let refused = |address: &str| format!("--listen {address}: another process listens there");
    check_refused(&["--config", config], &[], 1, &[&refused(&in_file)]);
    check_refused(&["up", "--config", config], &[], 1, &[&refused(&in_file)]);
    check_refused(&["up"], &[environment[0], ("BATON_CONFIG", config)], 1, &[&refused(&in_environment)]);
    check_refused(&["up", "--config", config, "--listen", &flag], &environment, 1, &[&refused(&flag)]);
}

fn three_taken() -> ([TcpListener; 3], [String; 3]) {
    let [(a, x), (b, y), (c, z)] = [taken(), taken(), taken()];
    ([a, b, c], [x, y, z])
}

#[test]
fn a_taken_port_says_what_to_do() {
    let (_held, address) = taken();
    check_refused(&["--listen", &address], &[], 1, &[&address, "choose another port", "--listen 127.0.0.1:0"]);
    let etcd = ["--etcd", "http://127.0.0.1:1"];
    check_refused(&[&["router", "--listen", &address], &etcd[..]].concat(), &[], 1, &["--listen", &address]);
    let worker = [&["prefill-worker", "--admin-listen", &address], &etcd[..]].concat();
    check_refused(&worker, &[], 1, &["--admin-listen", &address]);
}

#[test]
fn a_missing_model_is_named() {
    for command in [&["up"][..], &["router", "--etcd", "http://127.0.0.1:1"], &["decode-worker"]] {
        let args = [command, &["--model", "/no/such/model"]].concat();
        check_refused(&args, &[], 1, &["--model /no/such/model", "no such directory", "config.json"]);
    }
    check_refused(&[], &[("BATON_MODEL", "/no/such/model")], 1, &["/no/such/model"]);
}

#[test]
fn a_cluster_needs_etcd() {
    for command in ["router", "prefill-worker", "decode-worker"] {
        check_refused(&[command], &[], 1, &["--etcd is missing", "http://127.0.0.1:2379", "baton up"]);
        check_refused(&[command, "--etcd", "not a url"], &[], 1, &["--etcd", "not a url"]);
    }
}

#[test]
fn an_address_for_everybody_needs_a_name_for_others() {
    let args = ["prefill-worker", "--etcd", "http://127.0.0.1:1", "--listen", "0.0.0.0:0"];
    check_refused(&args, &[], 1, &["--listen 0.0.0.0:0", "--advertise"]);
}

#[test]
fn wrong_settings_name_the_field_and_the_value() {
    check_refused(&["--kv-memory", "lots"], &[], 2, &["--kv-memory", "lots", "512MiB"]);
    check_refused(&[], &[("BATON_PREFILL", "none")], 2, &["--prefill", "none", "a whole number"]);
    check_refused(&["--log", "a=b=c"], &[], 1, &["--log", "a=b=c"]);
    check_refused(&["--config", "/no/such/file.toml"], &[], 2, &["/no/such/file.toml"]);
    let config = file("[router.limits]\nmax_attemps = 3\n");
    let config = config.path().to_str().expect("a UTF-8 path");
    check_refused(&["--config", config], &[], 1, &[config, "[router]", "max_attemps", "max_attempts"]);
}

/// Before weights load: a token that is no token, and certificates that are none, whichever way they were named.
#[test]
fn files_that_links_cannot_be_made_with_are_named() {
    let short = file("short");
    let short = short.path().to_str().expect("a UTF-8 path");
    let reason = "5 bytes, at least 16 are wanted";
    for worker in ["prefill-worker", "decode-worker"] {
        let args = [worker, "--etcd", "http://127.0.0.1:1"];
        check_refused(
            &[&args[..], &["--cluster-token-file", short]].concat(),
            &[],
            1,
            &[&format!("--cluster-token-file {short}: {reason}")],
        );
        check_refused(
            &args,
            &[("BATON_CLUSTER_TOKEN_FILE", "/no/such/token")],
            1,
            &["--cluster-token-file /no/such/token: No such file"],
        );
        let table = file(&format!("[{worker}.transfer]\ncluster_token_file = {short:?}\n"));
        let table = table.path().to_str().expect("a UTF-8 path");
        check_refused(
            &[&args[..], &["--config", table]].concat(),
            &[],
            1,
            &[&format!("[{worker}.transfer] cluster_token_file {short}: {reason}")],
        );
        check_refused(&["--config", table], &[], 1, &[&format!("[{worker}.transfer] cluster_token_file {short}")]);
        let tls = format!("[{worker}.transfer.tls]\nca = {short:?}\ncert = {short:?}\nkey = {short:?}\n");
        let tls = file(&tls);
        let tls = tls.path().to_str().expect("a UTF-8 path");
        check_refused(
            &[&args[..], &["--config", tls]].concat(),
            &[],
            1,
            &[&format!("[{worker}.transfer.tls] ca {short}: no certificate in PEM")],
        );
    }
}

#[test]
fn nobody_to_chat_with() {
    let (held, address) = taken();
    drop(held);
    let url = format!("http://{address}");
    check_refused(&["chat", "--url", &url], &[], 1, &[&address, "is `baton` running there?", "--url"]);
    check_refused(&["chat", "--url", "https://localhost"], &[], 1, &["--url", "https://localhost", "http://"]);
}

#[test]
fn help_and_version_are_success() {
    for args in [&["--help"][..], &["prefill-worker", "--help"], &["--version"]] {
        let output = baton(args, &[]);
        assert!(output.status.success() && !output.stdout.is_empty(), "{args:?}");
    }
}
