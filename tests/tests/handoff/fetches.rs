//! A worker that lacks a prefix fetches it from a peer, or computes it where that fails: the tokens are the same.

use crate::{
    router::{Router, from_prefill, local, numbered, request, to_decode},
    workers::{Golden, Worker, kv_bytes, longest, small},
};
use cluster::{Member, MemoryDirectory};
use proto::{Fetch, Submit, ended::Reason};

/// Pages of the longest prompt that can be reused: the one of its last token never is.
const PAGES: u32 = 18;
const PAGE_TOKENS: u32 = 16;

fn fetching(submit: Submit, handoff: u64, holder: &Member, pages: u32) -> Submit {
    let Member { id: worker, incarnation, link, .. } = holder.clone();
    let fetch = Fetch { handoff, worker, incarnation, link, pages, required: false };
    Submit { fetch: Some(fetch), ..submit }
}

/// Has `router`'s worker compute the prompt and keep it.
async fn warm(router: &mut Router, prompt: &Golden) {
    router.submit(request(900, &prompt.ids, 1, local())).await;
    assert_eq!(router.ended(900).await.reason(), Some(Reason::Length));
}

async fn check(router: &mut Router, attempt: u64, prompt: &Golden, cached_pages: u32) {
    let said = router.ended(attempt).await;
    assert_eq!(said.reason(), Some(Reason::Length), "{said:?}");
    assert_eq!(said.tokens, numbered(&prompt.greedy, 0));
    assert_eq!(said.ended.map(|ended| ended.cached_tokens), Some(cached_pages * PAGE_TOKENS));
}

#[tokio::test]
async fn a_fetched_prefix_is_not_computed() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let holder = Worker::decode(&directory, "fetch-holder", small()).await;
    let asker = Worker::decode(&directory, "fetch-asker", small()).await;
    let (mut to_holder, mut to_asker) = (Router::attach(&holder.member).await, Router::attach(&asker.member).await);
    warm(&mut to_holder, &prompt).await;
    let submit = |attempt| request(attempt, &prompt.ids, prompt.greedy.len(), local());
    to_asker.submit(fetching(submit(1), 0xfe1, &holder.member, PAGES)).await;
    check(&mut to_asker, 1, &prompt, PAGES).await;
    // Now it is here: nobody is asked again, not even one that does not exist.
    let nobody = Member { id: "nobody".into(), link: "127.0.0.1:1".into(), ..holder.member.clone() };
    to_asker.submit(fetching(submit(2), 0xfe2, &nobody, PAGES)).await;
    check(&mut to_asker, 2, &prompt, PAGES).await;
    to_holder.all_pages_back().await;
    to_asker.all_pages_back().await;
    holder.stop().await.unwrap();
    asker.stop().await.unwrap();
}

#[tokio::test]
async fn a_prefill_worker_fetches_from_a_decode_worker_and_hands_all_of_it_on() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let holder = Worker::decode(&directory, "fetch-hot", small()).await;
    let prefill = Worker::prefill(&directory, "fetch-p", small()).await;
    let decode = Worker::decode(&directory, "fetch-d", small()).await;
    let (mut to_holder, mut to_prefill) = (Router::attach(&holder.member).await, Router::attach(&prefill.member).await);
    let mut to_decoder = Router::attach(&decode.member).await;
    warm(&mut to_holder, &prompt).await;
    let first = request(1, &prompt.ids, prompt.greedy.len(), to_decode(0xfe5, &decode.member));
    to_prefill.submit(fetching(first, 0xfe6, &holder.member, PAGES)).await;
    let rest = request(1, &prompt.ids, prompt.greedy.len(), from_prefill(0xfe5, &prefill.member));
    to_decoder.submit(rest).await;
    let said = to_prefill.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::HandedOff), "{said:?}");
    assert_eq!(said.ended.map(|ended| ended.cached_tokens), Some(PAGES * PAGE_TOKENS));
    assert_eq!(to_decoder.ended(1).await.tokens, numbered(&prompt.greedy, 1));
    for (router, worker) in [(&mut to_holder, holder), (&mut to_prefill, prefill), (&mut to_decoder, decode)] {
        router.all_pages_back().await;
        worker.stop().await.unwrap();
    }
}

#[tokio::test]
async fn what_does_not_come_is_computed() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let cold = Worker::decode(&directory, "fetch-cold", small()).await;
    let asker = Worker::decode(&directory, "fetch-lost", small()).await;
    let mut to_asker = Router::attach(&asker.member).await;
    let submit = |attempt| request(attempt, &prompt.ids, prompt.greedy.len(), local());
    to_asker.submit(fetching(submit(1), 0xfea, &cold.member, PAGES)).await;
    check(&mut to_asker, 1, &prompt, 0).await;
    let gone = cold.member.clone();
    cold.stop().await.unwrap();

    let directory = MemoryDirectory::default();
    let fresh = Worker::decode(&directory, "fetch-fresh", small()).await;
    let mut to_fresh = Router::attach(&fresh.member).await;
    to_fresh.submit(fetching(submit(2), 0xfeb, &gone, PAGES)).await;
    check(&mut to_fresh, 2, &prompt, 0).await;
    // Called off while it waits; a prompt behind it is not held up.
    to_fresh.submit(fetching(submit(3), 0xfec, &gone, PAGES)).await;
    to_fresh.cancel(3).await;
    to_fresh.submit(submit(4)).await;
    check(&mut to_fresh, 4, &prompt, PAGES).await;
    to_fresh.submit(fetching(submit(5), 0xfed, &gone, PAGES + 100)).await;
    let said = to_fresh.ended(5).await;
    assert_eq!(said.reason(), Some(Reason::Invalid));
    assert_eq!(said.message(), "fetch asks for 118 pages, not 1 to 18, the full pages of the tokens given");
    to_fresh.all_pages_back().await;
    to_asker.all_pages_back().await;
    fresh.stop().await.unwrap();
    asker.stop().await.unwrap();
}

#[tokio::test]
async fn a_worker_without_room_for_the_prefix_computes() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let holder = Worker::decode(&directory, "fetch-rich", small()).await;
    // Room for the sequence, while another one holds most of it: the prefix alone would not fit twice.
    let tight = engine::Config { kv_bytes: Some(kv_bytes(24)), ..small() };
    let asker = Worker::decode(&directory, "fetch-tight", tight).await;
    let (mut to_holder, mut to_asker) = (Router::attach(&holder.member).await, Router::attach(&asker.member).await);
    warm(&mut to_holder, &prompt).await;
    for attempt in 1..=4 {
        let submit = request(attempt, &prompt.ids, prompt.greedy.len(), local());
        to_asker.submit(fetching(submit, 0xff0 + attempt, &holder.member, PAGES)).await;
    }
    for attempt in 1..=4 {
        let said = to_asker.ended(attempt).await;
        assert_eq!(said.tokens, numbered(&prompt.greedy, 0), "{said:?}");
    }
    to_holder.all_pages_back().await;
    to_asker.all_pages_back().await;
    holder.stop().await.unwrap();
    asker.stop().await.unwrap();
}

/// Has `router`'s worker compute the prompt's first token, and keep its pages this long.
async fn keep(router: &mut Router, attempt: u64, prompt: &Golden, keep_ms: u32) {
    router.submit(Submit { keep_ms, ..request(attempt, &prompt.ids, 1, local()) }).await;
    let said = router.ended(attempt).await;
    assert_eq!((said.reason(), said.tokens), (Some(Reason::Length), numbered(&prompt.greedy[..1], 0)));
}

fn held(router: &Router) -> u32 {
    router.load.pages_total - router.load.pages_free
}

#[tokio::test]
async fn a_prefill_worker_keeps_a_prompt_until_it_is_fetched() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let holder = Worker::prefill(&directory, "keep-holder", small()).await;
    let asker = Worker::decode(&directory, "keep-asker", small()).await;
    let (mut to_holder, mut to_asker) = (Router::attach(&holder.member).await, Router::attach(&asker.member).await);
    keep(&mut to_holder, 1, &prompt, 600_000).await;
    to_holder.until("the kept pages", |router| held(router) == PAGES).await;
    let submit = request(1, &prompt.ids, prompt.greedy.len(), local());
    to_asker.submit(fetching(submit, 0xfa1, &holder.member, PAGES)).await;
    check(&mut to_asker, 1, &prompt, PAGES).await;
    to_holder.all_pages_back().await;
    // It goes no further than that.
    to_holder.submit(request(2, &prompt.ids, 2, local())).await;
    let said = to_holder.ended(2).await;
    assert_eq!(said.reason(), Some(Reason::Invalid));
    assert!(said.message().ends_with("goes no further than the first token, not to 2"), "{}", said.message());
    to_asker.all_pages_back().await;
    holder.stop().await.unwrap();
    asker.stop().await.unwrap();
}

#[tokio::test]
async fn what_nobody_fetches_is_kept_for_its_time_and_no_longer() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let holder = Worker::decode(&directory, "keep-in-vain", small()).await;
    let mut to_holder = Router::attach(&holder.member).await;
    keep(&mut to_holder, 1, &prompt, 300).await;
    to_holder.until("the kept pages", |router| held(router) == PAGES).await;
    to_holder.all_pages_back().await;
    holder.stop().await.unwrap();
}

#[tokio::test]
async fn a_leg_that_needs_its_prefix_is_refused_without() {
    let (directory, prompt) = (MemoryDirectory::default(), longest());
    let cold = Worker::decode(&directory, "need-cold", small()).await;
    let asker = Worker::decode(&directory, "need-asker", small()).await;
    let prefill = Worker::prefill(&directory, "need-prefill", small()).await;
    for worker in [&asker, &prefill] {
        let mut router = Router::attach(&worker.member).await;
        let mut submit = fetching(request(1, &prompt.ids, 1, local()), rand::random(), &cold.member, PAGES);
        submit.fetch.as_mut().unwrap().required = true;
        router.submit(submit).await;
        let said = router.ended(1).await;
        assert_eq!(said.reason(), Some(Reason::Refused), "{said:?}");
        assert_eq!(said.message(), format!("its pages could not be fetched: 0 of {PAGES} pages are here"));
        router.all_pages_back().await;
    }
    for worker in [cold, asker, prefill] {
        worker.stop().await.unwrap();
    }
}
