use super::*;
use std::io::Write;

fn read(args: &[&str]) -> Result<Settings, Error> {
    Settings::read(std::iter::once("baton").chain(args.iter().copied()).map(OsString::from))
}

fn with_file(text: &str, args: &[&str]) -> Result<Settings, Error> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("a file that can be written");
    let path = file.path().to_str().expect("a UTF-8 path").to_owned();
    let mut all = args.to_vec();
    all.extend(["--config", &path]);
    read(&all)
}

/// Checks that the settings are refused with a message that holds every one of `parts`.
fn check_refused(result: Result<Settings, Error>, parts: &[&str]) {
    let message = result.expect_err("settings that are refused").to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not mention {part:?}");
    }
}

fn up(settings: &Settings) -> &Up {
    match &settings.command {
        Command::Up(up) => up,
        other => panic!("expected up, got {other:?}"),
    }
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn without_a_subcommand_it_is_up() {
    let settings = read(&["--prefill", "2"]).expect("good settings");
    assert_eq!((up(&settings).prefill, up(&settings).decode), (2, 1));
    assert_eq!(up(&read(&["--prefill", "0"]).expect("decode workers alone are a cluster")).prefill, 0);
    assert_eq!(up(&settings).listen.to_string(), "127.0.0.1:8000");
    assert_eq!(up(&read(&["up", "--decode", "3"]).expect("good settings")).decode, 3);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file = "prefill = 3\ndecode = 2\nkv-memory = \"64MiB\"\n";
    for command in [&["up"][..], &[]] {
        let settings = with_file(file, &[command, &["--decode", "5"]].concat()).expect("good settings");
        let up = up(&settings);
        assert_eq!((up.prefill, up.decode, up.compute.kv_memory), (3, 5, Some(Bytes(64 << 20))));
        let source = |name: &str| settings.shown.iter().find(|shown| shown.name == name).map(|shown| shown.source);
        assert_eq!(
            [source("prefill"), source("decode"), source("kv-memory"), source("placement"), source("threads")],
            [Some("file"), Some("flag"), Some("file"), Some("default"), None]
        );
    }
}

#[test]
fn a_list_in_the_file_is_a_list() {
    let settings = with_file("etcd = [\"http://a:1\", \"http://b:2/\"]", &["router"]).expect("good settings");
    let Command::Router(router) = settings.command else { panic!("expected router") };
    assert_eq!(router.membership.etcd, ["http://a:1", "http://b:2/"]);
}

#[test]
fn adapters_are_named_directories() {
    let settings = read(&["--lora", "poet=/a", "--lora", "cook=/b=c", "--runtime-lora"]).expect("good settings");
    let named = |name: &str, dir: &str| (name.to_owned(), dir.into());
    assert_eq!(up(&settings).adapters.lora, [named("poet", "/a"), named("cook", "/b=c")]);
    assert!(up(&settings).runtime.runtime_lora);
    let file = "lora = [\"poet=/a\", \"cook=/b\"]\nmax-lora-rank = 16\nruntime-lora = true";
    let settings = with_file(file, &["up"]).expect("good settings");
    assert_eq!(up(&settings).adapters.lora, [named("poet", "/a"), named("cook", "/b")]);
    assert_eq!((up(&settings).adapters.max_lora_rank, up(&settings).runtime.runtime_lora), (Some(16), true));
    assert!(!up(&read(&[]).expect("good settings")).runtime.runtime_lora);
    check_refused(read(&["decode-worker", "--lora", "poet"]), &["'poet'", "--lora", "NAME=DIR"]);
    check_refused(with_file("lora = \"poet\"", &["up"]), &["lora = \"poet\"", "NAME=DIR"]);
}

#[test]
fn parsers_go_by_their_names() {
    let settings =
        read(&["--tool-call-parser", "qwen3_coder", "--reasoning-parser=deepseek_r1"]).expect("good settings");
    let dialect = &up(&settings).dialect;
    assert_eq!(dialect.tool_call_parser, Some(router::ToolCallParser::Qwen3Xml));
    assert_eq!(dialect.reasoning_parser, Some(router::ReasoningParser::DeepseekR1));
    let settings = with_file("tool-call-parser = \"none\"", &["up"]).expect("good settings");
    assert_eq!(up(&settings).dialect.tool_call_parser, Some(router::ToolCallParser::None));
    let settings = read(&["--embedding-pooling", "mean"]).expect("good settings");
    assert_eq!(up(&settings).dialect.embedding_pooling, Some(router::EmbeddingPooling::Mean));
    check_refused(read(&["--embedding-pooling", "cls"]), &["cls", "last", "mean"]);
    check_refused(read(&["--tool-call-parser", "hermit"]), &["hermit", "hermes"]);
}

#[test]
fn unknown_settings_name_file_and_field_and_list_the_known_ones() {
    check_refused(
        with_file("prefil = 2", &["up"]),
        &["config ", "unknown setting \"prefil\"", "`baton up` knows", "prefill, decode", "kv-memory"],
    );
    check_refused(with_file("prefill = 2", &["router"]), &["unknown setting \"prefill\"", "`baton router` knows"]);
    check_refused(with_file("[warp]\nspeed = 9", &["router"]), &["unknown table \"warp\"", "knows router"]);
}

#[test]
fn wrong_values_name_the_field_the_value_and_what_is_right() {
    check_refused(with_file("decode = 0", &["up"]), &["decode = \"0\"", "at least 1"]);
    check_refused(with_file("kv-memory = \"big\"", &["up"]), &["kv-memory = \"big\"", "512MiB"]);
    check_refused(with_file("placement = \"moon\"", &["up"]), &["placement = \"moon\"", "auto, remote, local"]);
    check_refused(with_file("listen = 1979-05-27", &["up"]), &["listen = 1979-05-27", "expected a string"]);
    check_refused(with_file("prefill = ", &["up"]), &["config ", "line 1"]);
    check_refused(read(&["--kv-dtype", "fp4"]), &["'fp4'", "--kv-dtype", "auto, f32, bf16, f16, fp8, int8"]);
    check_refused(read(&["--kv-memory", "big"]), &["'big'", "--kv-memory", "512MiB"]);
    check_refused(read(&["prefill-worker", "--drain-timeout", "30"]), &["'30'", "--drain-timeout", "30s"]);
    check_refused(read(&["router", "--otlp", "127.0.0.1:4317"]), &["--otlp", "http://127.0.0.1:4317"]);
    check_refused(read(&["decode-worker", "--advertise", "h:80"]), &["--advertise", "without a port"]);
    check_refused(read(&["--config", "/nowhere/baton.toml"]), &["/nowhere/baton.toml"]);
}

#[test]
fn library_tables_are_typed_by_the_library() {
    let settings = with_file("[engine]\ntoken_budget = 77", &["prefill-worker"]).expect("good settings");
    let engine: engine::Config = settings.tables.config("engine").expect("a good table");
    assert_eq!(engine.token_budget, 77);
    let settings = with_file("[engine]\nwarp = 9", &["prefill-worker"]).expect("a table known by name");
    let message = settings.tables.config::<engine::Config>("engine").expect_err("an unknown field").to_string();
    assert!(message.contains("table [engine]") && message.contains("warp"), "{message}");
}

#[test]
fn the_element_type_of_pages_is_a_flag_over_the_library_s_table() {
    use kv_cache::KvDtype;
    let dtype = |file: &str, args: &[&str]| {
        let settings = with_file(file, args).expect("good settings");
        crate::config::engine(&up(&settings).compute, &settings.tables).expect("a good table").kv_dtype
    };
    let table = "[engine]\nkv_dtype = \"int8\"";
    assert_eq!(dtype("", &["up"]), None);
    assert_eq!(dtype(table, &["up"]), Some(KvDtype::Int8));
    assert_eq!(dtype(table, &["up", "--kv-dtype", "auto"]), None);
    for each in KvDtype::ALL {
        assert_eq!(dtype(table, &["up", "--kv-dtype", &each.to_string()]), Some(each));
    }
}

#[test]
fn secrets_are_hidden() {
    let settings = read(&["router", "--etcd", "http://root:hunter2@a:1,http://b:2"]).expect("good settings");
    let etcd = settings.shown.iter().find(|shown| shown.name == "etcd").expect("etcd is shown");
    assert_eq!(etcd.value, "http://***@a:1,http://b:2");
    let settings = read(&["router", "--api-key", "hunter2"]).expect("good settings");
    assert!(settings.shown.iter().all(|shown| !shown.value.contains("hunter2")));
}

#[test]
fn a_certificate_needs_its_key() {
    check_refused(read(&["router", "--tls-cert", "cert.pem"]), &["--tls-key"]);
}

#[test]
fn a_door_of_a_worker_s_own_needs_no_cluster() {
    let args = ["decode-worker", "--http", "127.0.0.1:0", "--kv-peer", "10.0.0.7,[fd00::3]:7001", "--kv-lease", "5s"];
    let Command::DecodeWorker(decode) = read(&args).expect("good settings").command else { panic!("another command") };
    let http = decode.worker.http;
    assert_eq!(
        (http.kv_peers.len(), http.kv_lease, http.kv_load_failure),
        (2, Duration::from_secs(5), KvLoadFailure::Recompute)
    );
    check_refused(read(&[&args[..], &["--etcd", "http://127.0.0.1:2379"]].concat()), &["--http", "--etcd"]);
    check_refused(read(&["prefill-worker", "--kv-peer", "10.0.0.7"]), &["--http"]);
    check_refused(
        read(&["prefill-worker", "--http", "127.0.0.1:0", "--kv-peer", "a b"]),
        &["--kv-peer", "a b", "HOST:PORT"],
    );
}
