use super::*;
use crate::{
    Sample, Sampling, TokenId,
    cuda::{
        emulator::{self, Order},
        kernels::{
            Largest,
            tests::{Memory, noise, words},
        },
    },
    sampling::{self, Race, Scratch, Stuck},
};

/// A row of logits, and how its token is drawn.
struct Row {
    logits: Vec<f32>,
    sampling: Sampling,
    /// Tokens drawn before.
    index: usize,
}

impl Row {
    fn with_sample<T>(&self, use_it: impl FnOnce(&Sample<'_>) -> T) -> T {
        let (sampling, history) = (&self.sampling, vec![0; self.index]);
        use_it(&Sample { sampling, history: &history, prompt_tokens: 0, forbidden: &[], min_tokens: 0, grammar: None })
    }

    fn race(&self) -> Option<Race> {
        self.with_sample(|sample| sample.race())
    }

    /// What the host draws.
    fn drawn(&self) -> Result<TokenId, Stuck> {
        let mut scratch = Scratch::new(self.logits.len());
        self.with_sample(|sample| sampling::draw(&self.logits, sample, None, &mut scratch)).map(|drawn| drawn.token)
    }
}

/// Lets `rows`, which are equally long, race in both orders, and returns what was found for each.
fn found(rows: &[Row]) -> Vec<u32> {
    let columns = rows[0].logits.len();
    // What stands behind the columns is never read.
    let stride = columns.next_multiple_of(64);
    let padded = |row: &Row| [&row.logits[..], &vec![f32::INFINITY; stride - columns]].concat();
    let logits = Memory::of_floats(&rows.iter().flat_map(padded).collect::<Vec<_>>());
    let terms: Vec<u32> = rows.iter().flat_map(|row| row.race().map_or([0; 8], |race| race.words())).collect();
    let terms = Memory::of_words(&terms);
    let [forward, backward] = [Order::Forward, Order::Backward].map(|order| {
        let mut to = Memory::of_words(&vec![7; rows.len()]);
        let edges = Memory::of_words(&vec![u32::MAX; 2 * rows.len()]);
        let leads = Memory::of_bytes(&vec![0xff; rows.len() * Draw::lead_bytes(columns)]);
        let mut counters = Memory::of_words(&vec![0; rows.len()]);
        let (count, logits, to_address) = (rows.len() as u32, logits.address(), to.address());
        let (stride, columns) = (stride as u32, columns as u32);
        let largest = Largest { rows: count, logits, to: to_address, stride, columns };
        let draw = Draw {
            rows: count,
            logits,
            stride,
            columns,
            terms: terms.address(),
            to: to_address,
            edges: edges.address(),
            leads: leads.address(),
            counters: counters.address(),
        };
        for call in [largest.call()].iter().chain(&draw.calls()) {
            // SAFETY: every address is that of a `Memory`, sized as the calls document it; this test alone has them.
            unsafe { emulator::run(call, order) }.unwrap_or_else(|problem| panic!("{problem}"));
        }
        assert!(
            words(counters.bytes())[..rows.len()].iter().all(|count| *count == 0),
            "counters are left as they were"
        );
        words(to.bytes())[..rows.len()].to_vec()
    });
    assert_eq!(forward, backward, "the order of threads decides");
    forward
}

/// Compares what is found for `rows` with what the host draws, and returns how many were left undecided.
fn check(rows: &[Row]) -> usize {
    let mut undecided = 0;
    for (row, found) in rows.iter().zip(found(rows)) {
        let expected = match row.drawn() {
            Ok(token) => token,
            Err(Stuck::NoLogits) => u32::MAX,
            Err(other) => panic!("{other}"),
        };
        undecided += usize::from(found == Draw::UNDECIDED);
        let head = &row.logits[..row.logits.len().min(12)];
        assert!(
            found == expected || found == Draw::UNDECIDED,
            "{found} and not {expected}, by {:?} at {} of {head:?}",
            row.sampling,
            row.index
        );
    }
    undecided
}

const TEMPERATURES: [f32; 9] = [1e-5, 0.01, 0.3, 0.7, 1.0, 1.5, 2.0, 50.0, 1e6];
const TOP_KS: [u32; 8] = [0, 1, 2, 3, 20, 64, 1000, u32::MAX];
const TOP_PS: [f32; 9] = [1.0, 0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.999, 1.0 - f32::EPSILON / 2.0];
const MIN_PS: [f32; 6] = [0.0, 1e-3, 0.05, 0.3, 0.9, 1.0];

/// A choice among `all` that depends on `salt` and `index`.
fn pick<T: Copy>(all: &[T], salt: u64, index: usize) -> T {
    all[((noise(salt, index) + 1.0) / 2.0 * all.len() as f32) as usize % all.len()]
}

fn sampling(index: usize) -> Sampling {
    // Each rule is off in half of the rows.
    let on = |salt| noise(salt, index) > 0.0;
    Sampling {
        temperature: pick(&TEMPERATURES, 1, index),
        top_k: if on(2) { pick(&TOP_KS, 3, index) } else { 0 },
        top_p: if on(4) { pick(&TOP_PS, 5, index) } else { 1.0 },
        min_p: if on(6) { pick(&MIN_PS, 7, index) } else { 0.0 },
        seed: (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        choice: index as u32 % 3,
        ..Sampling::default()
    }
}

/// Logits of a shape that depends on `index`: about normal, with few or many equals, with holes, with a few far ahead.
fn logits(index: usize, columns: usize) -> Vec<f32> {
    let salt = 100 + index as u64;
    let normal = |at: usize| (0..4).map(|part| noise(salt, 4 * at + part)).sum::<f32>();
    let spread = pick(&[0.001, 0.3, 1.0, 3.0, 10.0], 8, index);
    let one = |at: usize| {
        let value = normal(at) * spread;
        match index % 6 {
            0 | 1 => value,
            2 => (value * 4.0).round() / 4.0,
            3 => (value * 100.0).round() / 100.0,
            4 if at % 5 == 1 => [f32::NAN, f32::NEG_INFINITY][at % 2],
            5 if at % 97 == 3 => value + 4.0 * spread,
            _ => value,
        }
    };
    (0..columns).map(one).collect()
}

#[test]
fn tokens_are_those_that_the_host_draws() {
    let (mut rows, mut undecided) = (0, 0);
    for (batch, columns) in [1, 2, 31, 100, 257, 1000, 1001, 3000].repeat(6).into_iter().enumerate() {
        let row = |at: usize| {
            let index = batch * 80 + at;
            Row { logits: logits(index, columns), sampling: sampling(index), index: index % 50 }
        };
        let all: Vec<Row> = (0..80).map(row).collect();
        undecided += check(&all);
        rows += all.len();
    }
    // Most of these: at 50 and more all weights are nearly equal, and so they are where logits hardly differ.
    assert!(undecided * 4 < rows, "{undecided} of {rows} are left to the host");
}

#[test]
fn hardly_a_row_of_a_model_is_left_to_the_host() {
    // About what models give: thousands of tokens of which few matter, and more blocks than one.
    let row = |index: usize| {
        let [temperature, top_p, min_p] =
            [[1.0, 1.0, 0.0], [0.7, 0.9, 0.0], [0.6, 0.95, 0.0], [1.0, 1.0, 0.05]][index % 4];
        let top_k = [0, 0, 20, 0][index % 4];
        let logits = (0..20_001).map(|at| {
            let uniform = f64::from(noise(200 + index as u64, at) / 2.0 + 0.5);
            // The tail of a Gumbel distribution, as next tokens have it.
            (-2.0 * (-uniform.max(1e-9).ln()).max(1e-9).ln()) as f32
        });
        let seed = index as u64;
        let sampling = Sampling { temperature, top_p, min_p, top_k, seed, ..Sampling::default() };
        Row { logits: logits.collect(), sampling, index }
    };
    let rows: Vec<Row> = (0..200).map(row).collect();
    let undecided = check(&rows);
    assert!(undecided <= 2, "{undecided} of {} are left to the host", rows.len());
}

#[test]
fn a_row_depends_on_itself_alone() {
    let row = |index: usize| Row { logits: logits(index, 9000), sampling: sampling(index), index };
    let rows: Vec<Row> = (0..24).map(row).collect();
    let together = found(&rows);
    for (index, together) in together.into_iter().enumerate() {
        assert_eq!(found(&[row(index)]), [together], "row {index}");
    }
}

#[test]
fn rows_that_do_not_race_keep_the_largest() {
    let greedy = |logits: &[f32]| Row { logits: logits.to_vec(), sampling: Sampling::default(), index: 0 };
    let warm = Row { sampling: Sampling { temperature: 1.0, seed: 9, ..Sampling::default() }, ..greedy(&[0.0; 4]) };
    let token = warm.drawn().expect("a token");
    assert_eq!(found(&[greedy(&[1.0, 3.0, 3.0, 2.0]), warm, greedy(&[f32::NAN; 4])]), [1, token, u32::MAX]);
}

/// Draws from `logits` by every kind of terms; `most` may be left to the host.
fn check_all(logits: &[f32], most: usize) {
    let mut rows = Vec::new();
    for temperature in [1e-5, 0.01, 1.0, 1.7, 1e30] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (2, 1.0, 0.0),
            (7, 1.0, 0.0),
            (0, 0.0, 0.0),
            (0, 0.5, 0.0),
            (0, 0.9, 0.0),
            (3, 0.6, 0.0),
            (0, 1.0, 0.5),
            (0, 1.0, 1.0),
            (4, 0.7, 0.2),
        ] {
            for seed in 0..3 {
                let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
                rows.push(Row { logits: logits.to_vec(), sampling, index: 3 });
            }
        }
    }
    let undecided = check(&rows);
    assert!(
        undecided <= most,
        "{undecided} of {} are left to the host: {:?}",
        rows.len(),
        &logits[..logits.len().min(9)]
    );
}

#[test]
fn rows_that_are_out_of_the_ordinary() {
    let (nan, infinite, least) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    check_all(&[0.5], 0);
    check_all(&[nan, least, -3.0, nan, least], 0);
    check_all(&[nan; 70], 0);
    check_all(&[least; 70], 0);
    check_all(&[nan, least, nan], 0);
    check_all(&[1.0, infinite, 3.0, infinite], 0);
    // Where an edge lies among equals, the host finds which of them are kept.
    check_all(&[f32::MAX, f32::MIN, 0.0, f32::MAX], 48);
    check_all(&[2.0, 2.0], 48);
    check_all(&[-0.0, 0.0], 48);
    check_all(&[3.0, 2.0, 2.0, 1.0, 0.0, -50.0, -500.0], 24);
    check_all(&[0.0; 1000], 123);
    // Distances that are no weights apart.
    check_all(&[3e-20, 2e-20, 1e-20, 0.0, 5e-20, -1.0, -2.0, -3.0], 96);
    let mut steep = vec![-30.0; 3000];
    steep[2999] = 20.0;
    check_all(&steep, 27);
    check_all(&(0..40).map(|at| -0.1 * at as f32).collect::<Vec<_>>(), 27);
}
