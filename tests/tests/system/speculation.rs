//! Guessing tokens ahead changes no word of an answer, wherever its prompt was computed.

use cluster_tests::{Speculation, TestCluster, root};
use kv_transfer::TransportKind;
use router::Policy;
use serde_json::{Value, json};

/// Answers of several kinds, side by side: greedy, sampled, penalised, several choices, stop strings, all with their log-probabilities.
async fn answers(mode: Policy, speculation: Speculation) -> anyhow::Result<(Vec<Value>, f64, f64)> {
    let cluster =
        TestCluster::new().placement(mode).transport(TransportKind::Tcp).speculation(speculation).start().await?;
    let chat = |more: Value| {
        let mut request = json!({
            "model": "test", "max_tokens": 80, "logprobs": true, "top_logprobs": 2, "seed": 11,
            "messages": [{"role": "user", "content": "What is a KV cache? What is a KV cache? What is a KV cache?"}],
        });
        request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        request
    };
    let requests = [
        chat(json!({"temperature": 0})),
        chat(json!({"temperature": 0, "ignore_eos": true})),
        chat(json!({"temperature": 0.8, "n": 3})),
        chat(json!({"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.4})),
        chat(json!({"temperature": 0, "min_tokens": 30, "stop": ["cache"]})),
        // It says one thing only, so that every guess from its own text is right, whichever the policy has time for.
        chat(json!({"temperature": 0, "ignore_eos": true, "allowed_token_ids": [300]})),
    ];
    let client = &cluster.client;
    let before = |name: &'static str| async move { client.metric(name, &[]).await.unwrap_or(0.0) };
    let (drafts, accepted) =
        (before("baton_speculation_drafts_total").await, before("baton_speculation_accepted_total").await);
    let posts = requests.iter().map(|request| client.post("/v1/chat/completions", request));
    let mut answers = Vec::new();
    for answer in futures::future::join_all(posts).await {
        let answer = answer?;
        anyhow::ensure!(answer.status == 200, "{}", answer.text);
        answers.push(answer.json()["choices"].clone());
    }
    // The last counts arrive with the workers' next report, as the pages do.
    super::cancel::pages_come_back(client).await?;
    let (drafts, accepted) = (
        before("baton_speculation_drafts_total").await - drafts,
        before("baton_speculation_accepted_total").await - accepted,
    );
    cluster.stop().await?;
    Ok((answers, drafts, accepted))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_with_and_without() -> anyhow::Result<()> {
    let (plain, drafts, _) = answers(Policy::Local, Speculation::Off).await?;
    assert_eq!(drafts, 0.0);
    for mode in [Policy::Local, Policy::Remote] {
        for speculation in [Speculation::Ngrams, Speculation::Draft(root().join("models/demo-draft"))] {
            let (speculated, drafts, accepted) = answers(mode, speculation.clone()).await?;
            assert_eq!(speculated, plain, "{mode:?} {speculation:?}");
            assert!(drafts >= accepted && accepted > 0.0, "{mode:?} {speculation:?}: {accepted} of {drafts}");
        }
    }
    Ok(())
}
