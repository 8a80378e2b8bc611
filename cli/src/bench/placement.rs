//! What choosing a worker costs, beside a plain hash map of the same page names.
//!
//! A thousand workers hold ten million pages: documents as long as a prompt of 128k tokens, most of them at one worker, some at several. All begin
//! with a system prompt that everybody holds, and of one document every worker holds another part. The plain map has the same names
//! as keys, a number as value and a hasher that takes names as they are, as the index does: it costs what memory costs. But for the filling, which
//! happens once, figures are medians. One thread does all of it.

use super::{report::Report, stats::Samples};
use kv_cache::PageHash;
use placement::{Candidate, Demand, Kind, Ledger, Policy, PrefixIndex, Report as Load, Slot, Weights, Worker};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    hint::black_box,
    time::{Duration, Instant},
};
use timing::Pace;

const WORKERS: usize = 1_000;
const PAGES: usize = 10_000_000;
/// What the index may take: with it, half of the pages are in the old generation, and move when they are asked for.
const BUDGET: usize = 256 << 20;
const PAGE_TOKENS: u32 = 16;
/// Pages of a prompt of 128k tokens.
const PROMPT: usize = (128 << 10) / PAGE_TOKENS as usize;
/// Pages that all prompts begin with.
const SHARED: usize = 64;
/// Pages that a worker reports at once.
const FRAME: usize = 256;
const LOOKUPS: usize = 1_000_000;
const ROUNDS: usize = 5;
const PLACEMENTS: usize = 201;
/// A placement should not take longer.
const BAR_MS: f64 = 1.0;

type Plain = HashMap<PageHash, u32, BuildHasherDefault<AsItIs>>;

/// Measures every `placement/` row that is wanted.
pub(super) fn run(report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("placement/") {
        return Ok(());
    }
    let documents = documents();
    let mut index = PrefixIndex::new(BUDGET);
    let slots: Vec<Slot> = (0..WORKERS).map(|_| index.assign()).collect();
    let mut plain = Plain::default();
    store(report, &mut index, &mut plain, &slots, &documents)?;
    look_up(report, &mut index, &plain, &documents)?;
    choose(report, &mut index, &slots, &documents)?;
    evict(report, &mut index, &mut plain, &slots, &documents)
}

/// The names of every document's pages. Names are as random as what they stand for, a hash.
fn documents() -> Vec<Vec<PageHash>> {
    let mut random = StdRng::seed_from_u64(1);
    let shared: Vec<PageHash> = (0..SHARED).map(|_| PageHash(random.random())).collect();
    let document = |_| {
        let own = (SHARED..PROMPT).map(|_| PageHash(random.random()));
        shared.iter().copied().chain(own).collect()
    };
    (0..(PAGES - SHARED).div_ceil(PROMPT - SHARED)).map(document).collect()
}

/// Who holds how many leading pages of a document.
fn holders(document: usize) -> Vec<(usize, usize)> {
    match document {
        0 => (0..WORKERS).map(|worker| (worker, SHARED + worker * 7_919 % (PROMPT - SHARED))).collect(),
        _ => (0..if document % 8 == 1 { 4 } else { 1 }).map(|n| ((document + 131 * n) % WORKERS, PROMPT)).collect(),
    }
}

fn store(
    report: &mut Report,
    index: &mut PrefixIndex,
    plain: &mut Plain,
    slots: &[Slot],
    documents: &[Vec<PageHash>],
) -> anyhow::Result<()> {
    // The first document is many times as much work for the index as for the map: it is not compared.
    for (worker, pages) in holders(0) {
        index.store(slots[worker], documents[0][..pages].iter().copied());
    }
    plain.extend(documents[0].iter().map(|&name| (name, 0)));
    let (mut took, mut took_plain, mut stored) = (Duration::ZERO, Duration::ZERO, 0);
    for (number, names) in documents.iter().enumerate().skip(1) {
        for (worker, pages) in holders(number) {
            took += time(|| {
                names[..pages].chunks(FRAME).for_each(|frame| index.store(slots[worker], frame.iter().copied()))
            });
            took_plain += time(|| plain.extend(names[..pages].iter().map(|&name| (name, worker as u32))));
            stored += pages;
        }
    }
    rate(report, "placement/index/stored_pages_per_s", stored, took, took_plain)?;
    report.row("placement/index/pages_kept", index.pages() as f64, "pages", Some(plain.len() as f64))?;
    let bytes = index.bytes() as f64;
    report.row("placement/index/memory", bytes / 1e6, "MB", Some(BUDGET as f64 / 1e6))?;
    let slot = size_of::<(PageHash, u32)>() + 1;
    let plain_bytes = (plain.capacity() * 8 / 7).next_power_of_two() * slot;
    report.row(
        "placement/index/bytes_per_page",
        bytes / index.pages() as f64,
        "B",
        Some(plain_bytes as f64 / plain.len() as f64),
    )
}

fn look_up(
    report: &mut Report,
    index: &mut PrefixIndex,
    plain: &Plain,
    documents: &[Vec<PageHash>],
) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(2);
    let any = |_| documents[random.random_range(1..documents.len())][random.random_range(SHARED..PROMPT)];
    let names: Vec<PageHash> = (0..LOOKUPS).map(any).collect();
    let mut leading = Vec::new();
    let [took, took_plain] = rounds(|| {
        let one = |name: &PageHash| {
            index.matches(std::slice::from_ref(name), &mut leading);
            black_box(&leading);
        };
        [
            time(|| names.iter().for_each(one)),
            time(|| {
                black_box(names.iter().filter_map(|name| plain.get(name)).fold(0, |sum, held| sum ^ held));
            }),
        ]
    });
    rate(report, "placement/index/lookups_per_s", LOOKUPS, took, took_plain)?;
    let asked = &documents[1..documents.len().min(LOOKUPS / PROMPT)];
    let [took, took_plain] = rounds(|| {
        [
            time(|| asked.iter().for_each(|names| index.matches(names, &mut leading))),
            time(|| {
                let held = |names: &Vec<PageHash>| names.iter().take_while(|name| plain.contains_key(name)).count();
                black_box(asked.iter().map(held).sum::<usize>());
            }),
        ]
    });
    rate(report, "placement/index/matched_pages_per_s", asked.len() * PROMPT, took, took_plain)
}

/// Forgets a tenth.
fn evict(
    report: &mut Report,
    index: &mut PrefixIndex,
    plain: &mut Plain,
    slots: &[Slot],
    documents: &[Vec<PageHash>],
) -> anyhow::Result<()> {
    let (mut took, mut took_plain, mut evicted) = (Duration::ZERO, Duration::ZERO, 0);
    for (number, names) in documents.iter().enumerate().skip(2).step_by(8) {
        let gone = &names[SHARED..];
        for (worker, _) in holders(number) {
            took += time(|| index.evict(slots[worker], gone.iter().rev().copied()));
            took_plain += time(|| gone.iter().rev().for_each(|name| assert!(black_box(plain.remove(name)).is_some())));
            evicted += gone.len();
        }
    }
    rate(report, "placement/index/evicted_pages_per_s", evicted, took, took_plain)
}

/// Placements of prompts of 128k tokens: of which nobody knows more than the system prompt, of which some worker holds all, and of which every
/// worker holds another part.
fn choose(
    report: &mut Report,
    index: &mut PrefixIndex,
    slots: &[Slot],
    documents: &[Vec<PageHash>],
) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(3);
    let ledgers: Vec<Ledger> = (0..WORKERS).map(|_| ledger(&mut random)).collect();
    let mut new = documents[0].clone();
    new[SHARED..].iter_mut().for_each(|name| *name = PageHash(random.random()));
    let mut leading = Vec::new();
    for what in ["new", "cached", "scattered"] {
        let row = format!("placement/choose_ms/{what}");
        if !report.wants(&row) {
            continue;
        }
        let took: Samples = (0..PLACEMENTS)
            .map(|n| {
                let pages = match what {
                    "new" => &new,
                    "cached" => &documents[1 + n * 577 % (documents.len() - 1)],
                    _ => &documents[0],
                };
                let draw = random.random();
                time(|| place(index, slots, &ledgers, pages, &mut leading, draw)).as_secs_f64() * 1e3
            })
            .collect();
        report.row(&row, took.median(), "ms", Some(BAR_MS))?;
    }
    Ok(())
}

/// What a router does for a placement.
fn place(
    index: &mut PrefixIndex,
    slots: &[Slot],
    ledgers: &[Ledger],
    pages: &[PageHash],
    leading: &mut Vec<u32>,
    random: u64,
) {
    let now = Duration::from_secs(1);
    index.matches(pages, leading);
    let candidate = |(id, ledger): (usize, &Ledger)| Candidate {
        id,
        kind: if id < WORKERS / 2 { Kind::Prefill } else { Kind::Decode },
        fingerprint: 0,
        draining: false,
        excluded: false,
        lacks_adapter: false,
        max_tokens: 1 << 20,
        cost: Worker {
            sequences: ledger.sequences(),
            backlog_ms: ledger.backlog_ms(now),
            sending_ms: ledger.sending_ms(now),
            free_pages: ledger.free_pages(0),
            held_pages: ledger.held_pages(),
            cached_pages: leading[slots[id].index()],
            coming_pages: 0,
            page_tokens: PAGE_TOKENS,
            page_bytes: 2 << 20,
            speed: ledger.speed(),
        },
    };
    let candidates: Vec<Candidate> = ledgers.iter().enumerate().map(candidate).collect();
    let demand = Demand { tokens: 128 << 10, max_output: 500 };
    let placed = placement::place(&demand, &candidates, Policy::Auto, &Weights::default(), random);
    black_box(placed.expect("a thousand workers can take it"));
}

/// A worker with some load, of some speed.
fn ledger(random: &mut StdRng) -> Ledger {
    let pace = Pace {
        step_us: random.random_range(9e3..12e3),
        sequence_us: 20.0,
        context_ns: 20.0,
        token_us: random.random_range(100.0..130.0),
        pair_ns: 2.0,
    };
    let mut ledger = Ledger::default();
    let load = Load {
        sequences: random.random_range(0..64),
        backlog_ms: random.random_range(0.0..5_000.0),
        free_pages: random.random_range(1_000..80_000),
        total_pages: 80_000,
        pace: Some(pace),
        link_bytes_per_s: Some(2e10),
        ..Load::default()
    };
    ledger.report(load, Duration::from_secs(1));
    ledger.submit(1, random.random_range(0.0..100.0), 100, Duration::from_secs(1));
    ledger
}

fn time(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

/// Measures two things in turns; returns the medians.
fn rounds(mut measure: impl FnMut() -> [Duration; 2]) -> [Duration; 2] {
    let measured: Vec<[Duration; 2]> = (0..ROUNDS).map(|_| measure()).collect();
    [0, 1].map(|which| {
        let median = measured.iter().map(|round| round[which].as_secs_f64()).collect::<Samples>().median();
        Duration::from_secs_f64(median)
    })
}

fn rate(report: &mut Report, name: &str, count: usize, took: Duration, plain: Duration) -> anyhow::Result<()> {
    let per_s = |took: Duration| count as f64 / took.as_secs_f64();
    report.row(name, per_s(took), "1/s", Some(per_s(plain)))
}

/// Page names are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }
}
