//! Workers driven by a proxy that is none of ours, over HTTP alone, as vLLM's are: `kv_transfer_params`.

use cluster_tests::{
    Client,
    client::chat_text,
    process::{Baton, free_address},
};
use serde_json::{Value, json};
use std::{io::Write, time::Duration};
use tempfile::NamedTempFile;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Tokens in a page of the bundled model.
const PAGE_TOKENS: u64 = 16;

/// A worker process without a cluster, its door, and its metrics.
struct Worker {
    process: Baton,
    http: Client,
    admin: Client,
}

impl Worker {
    async fn start(role: &str, more: &[&str]) -> Self {
        let [http, admin] = [(); 2].map(|()| free_address().to_string());
        let mut arguments = vec![role, "--http", &http, "--admin-listen", &admin, "--threads", "1"];
        arguments.extend(more);
        let mut process = Baton::start(&arguments);
        let [http, admin] = [http, admin].map(|address| Client::new(format!("http://{address}")));
        process.ready(&http, "/readyz", Duration::from_secs(30)).await;
        Self { process, http, admin }
    }

    /// Prompt tokens that came from peers.
    async fn fetched(&self) -> anyhow::Result<u64> {
        let came = self.admin.metric("vllm:external_prefix_cache_hits_total", &[]).await? as u64;
        let source = "source=\"external_kv_transfer\"";
        let used = self.admin.metric("vllm:prompt_tokens_by_source_total", &[source]).await? as u64;
        anyhow::ensure!(came == used, "{came} tokens came, {used} were used");
        Ok(came)
    }

    /// Prompts that were kept, by what became of them.
    async fn kept(&self, outcome: &str) -> anyhow::Result<u64> {
        let label = format!("outcome=\"{outcome}\"");
        Ok(self.admin.metric("baton_kept_prompts_total", &[&label]).await? as u64)
    }
}

/// What every such proxy does: the same body to a prefill worker, for one token, and where that says the pages are to a decode worker.
async fn prefilled(prefill: &Worker, path: &str, body: &Value) -> anyhow::Result<Value> {
    let mut first = body.clone();
    first["kv_transfer_params"] = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null});
    first["stream"] = json!(false);
    first["max_tokens"] = json!(1);
    let fields = first.as_object_mut().expect("a body is an object");
    fields.remove("stream_options");
    let answer = prefill.http.post(path, &first).await?;
    anyhow::ensure!(answer.status == 200, "{}", answer.text);
    let mut second = body.clone();
    second["kv_transfer_params"] = answer.json()["kv_transfer_params"].clone();
    Ok(second)
}

async fn through(prefill: &Worker, decode: &Worker, path: &str, body: &Value) -> anyhow::Result<Value> {
    answered(decode, path, &prefilled(prefill, path, body).await?).await
}

async fn answered(worker: &Worker, path: &str, body: &Value) -> anyhow::Result<Value> {
    let answer = worker.http.post(path, body).await?;
    anyhow::ensure!(answer.status == 200, "{}", answer.text);
    Ok(answer.json())
}

/// Prompt tokens of an answer, and those of them that were not computed.
fn prompt(answer: &Value) -> (u64, u64) {
    let usage = &answer["usage"];
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("no number in {usage}"));
    (number(&usage["prompt_tokens"]), number(&usage["prompt_tokens_details"]["cached_tokens"]))
}

/// A request that shares no page with another `topic`'s.
fn completion(topic: &str) -> Value {
    let prompt = format!("{topic}. {}", "The fox asks the hen where the corn is kept. ".repeat(12));
    json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true})
}

fn token(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file can be made");
    file.write_all(text.as_bytes()).expect("it can be written");
    file
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strange_proxy_has_one_worker_prefill_and_another_decode() -> anyhow::Result<()> {
    let secret = token("a secret that both workers have");
    let secret = secret.path().to_str().expect("paths here are text");
    let shared = ["--cluster-token-file", secret, "--kv-memory", "16MiB"];
    let prefill = Worker::start("prefill-worker", &[&["--name", "p"][..], &shared].concat()).await;
    let decode = Worker::start("decode-worker", &[&["--kv-peer", "127.0.0.1"][..], &shared].concat()).await;

    // The same tokens as without a proxy, and every full page of the prompt came from the other worker.
    let request = completion("Plain");
    let mut alone = request.clone();
    alone["cache_salt"] = json!("computed here");
    let plain = answered(&decode, COMPLETIONS, &alone).await?;
    assert_eq!((prompt(&plain).1, decode.fetched().await?), (0, 0));
    let answer = through(&prefill, &decode, COMPLETIONS, &request).await?;
    assert_eq!(answer["choices"][0]["text"], plain["choices"][0]["text"]);
    let (tokens, cached) = prompt(&answer);
    assert_eq!(cached, (tokens - 1) / PAGE_TOKENS * PAGE_TOKENS, "of {tokens} tokens");
    assert!(cached > 5 * PAGE_TOKENS, "{cached}");
    assert_eq!((decode.fetched().await?, prefill.kept("fetched").await?), (cached, 1));
    assert!(answer.get("kv_transfer_params").is_none(), "{answer}");

    // A chat, streamed; drawn by chance, from a seed.
    let words = "Tell me of the corn. ".repeat(10);
    let mut chat = json!({"messages": [{"role": "user", "content": words}], "max_tokens": 20, "temperature": 1, "seed": 5,
        "ignore_eos": true, "cache_salt": "a", "stream": true, "stream_options": {"include_usage": true}});
    let (plain, _) = decode.http.stream(CHAT, &chat).await?.collect().await?;
    chat["cache_salt"] = json!("b");
    let chat = prefilled(&prefill, CHAT, &chat).await?;
    let (chunks, done) = decode.http.stream(CHAT, &chat).await?.collect().await?;
    assert!(done && chat_text(&chunks) == chat_text(&plain), "{:?}", chat_text(&chunks));
    let (_, more) = prompt(chunks.last().expect("a stream has chunks"));
    assert_eq!((decode.fetched().await?, prefill.kept("fetched").await?), (cached + more, 2));

    // A decode worker can be asked for the first part, too, and says so in its last chunk.
    let mut first = completion("Streamed");
    first["stream"] = json!(true);
    first["kv_transfer_params"] = json!({"do_remote_decode": true});
    let (chunks, _) = decode.http.stream(COMPLETIONS, &first).await?.collect().await?;
    let told: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.get("kv_transfer_params")).collect();
    assert_eq!(told.len(), 1);
    assert!(chunks.last().is_some_and(|last| last.get("kv_transfer_params").is_some()));
    assert_eq!((&told[0]["do_remote_prefill"], &told[0]["remote_host"]), (&json!(true), &json!("127.0.0.1")));

    // What a prefill worker's door does not do; whom nobody may have a worker call.
    let answer = prefill.http.post(COMPLETIONS, &completion("Far")).await?;
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("max_tokens")), "{}", answer.text);
    let mut elsewhere = prefilled(&prefill, COMPLETIONS, &completion("Elsewhere")).await?;
    elsewhere["kv_transfer_params"]["remote_host"] = json!("169.254.169.254");
    let answer = decode.http.post(COMPLETIONS, &elsewhere).await?;
    assert_eq!(answer.status, 400, "{}", answer.text);
    assert!(answer.text.contains("--kv-peer") && answer.text.contains("169.254.169.254"), "{}", answer.text);

    // A worker of the right address and the wrong name is none of ours.
    elsewhere["kv_transfer_params"]["remote_host"] = json!("127.0.0.1");
    elsewhere["kv_transfer_params"]["remote_engine_id"] = json!("q@1");
    let answer = answered(&decode, COMPLETIONS, &elsewhere).await?;
    assert_eq!(prompt(&answer).1, 0, "{answer}");

    // Both stop when they are told to.
    for worker in [prefill, decode] {
        worker.process.signal("TERM");
        let (code, output) = worker.process.exit(Duration::from_secs(20)).await;
        assert_eq!(code, Some(0), "{output}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_do_not_come_are_computed_or_refused_as_the_operator_wants() -> anyhow::Result<()> {
    let prefill = Worker::start("prefill-worker", &["--kv-memory", "4MiB", "--kv-lease", "250ms"]).await;
    let peer = ["--kv-memory", "16MiB", "--kv-peer", "127.0.0.1"];
    let decode = Worker::start("decode-worker", &peer).await;
    let strict = Worker::start("decode-worker", &[&peer[..], &["--kv-load-failure", "fail"]].concat()).await;

    // The lease ended, and others took the room.
    let request = completion("Late");
    let late = prefilled(&prefill, COMPLETIONS, &request).await?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while prefill.kept("expired").await? < 1 {
        anyhow::ensure!(tokio::time::Instant::now() < deadline, "the lease has not ended after 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pages = prefill.admin.metric("baton_pages", &[]).await? as u64;
    for other in 0..=pages * PAGE_TOKENS / prompt(&answered(&prefill, COMPLETIONS, &one_token("0")).await?).0 {
        answered(&prefill, COMPLETIONS, &one_token(&format!("Other {other}"))).await?;
    }
    let answer = answered(&decode, COMPLETIONS, &late).await?;
    assert_eq!((prompt(&answer).1, decode.fetched().await?), (0, 0));
    let reference = answered(&strict, COMPLETIONS, &request).await?;
    assert_eq!(answer["choices"][0]["text"], reference["choices"][0]["text"]);

    // The peer is gone.
    let lost = prefilled(&prefill, COMPLETIONS, &completion("Lost")).await?;
    drop(prefill);
    let answer = answered(&decode, COMPLETIONS, &lost).await?;
    assert_eq!((prompt(&answer).1, decode.fetched().await?), (0, 0));
    let refused = strict.http.post(COMPLETIONS, &lost).await?;
    assert_eq!(refused.status, 503, "{}", refused.text);
    assert!(refused.text.contains("its pages could not be fetched"), "{}", refused.text);
    assert!(refused.headers.contains_key("retry-after"), "{:?}", refused.headers);
    Ok(())
}

fn one_token(topic: &str) -> Value {
    let mut request = completion(topic);
    request["max_tokens"] = json!(1);
    request
}
