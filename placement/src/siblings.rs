//! Prompts under way, for those that begin like them.
//!
//! The prefix index knows what has been computed. Of a burst of prompts with a common beginning, none has been when the second is placed: it
//! should follow the first, whose pages will be there when its turn comes. A page's name stands for all tokens before it, so what two
//! prompts have in common is found by bisection.

use kv_cache::PageHash;
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

/// Prompts compared with a new one at each worker, the latest first: enough for a burst, and a bound on the time.
const COMPARED: usize = 8;

/// Prompts that workers will compute, by where and how they begin.
#[derive(Debug, Default)]
pub struct Siblings {
    by_first: HashMap<PageHash, VecDeque<Prompt>>,
}

#[derive(Debug)]
struct Prompt {
    worker: u64,
    number: u64,
    pages: Arc<[PageHash]>,
}

impl Siblings {
    /// Notes that `worker` will compute the prompt with these full pages.
    pub fn add(&mut self, worker: u64, number: u64, pages: &Arc<[PageHash]>) {
        if let Some(first) = pages.first() {
            let prompts = self.by_first.entry(*first).or_default();
            prompts.push_front(Prompt { worker, number, pages: pages.clone() });
        }
    }

    /// Forgets a prompt that is computed, or will not be. `first` is its first page's name.
    pub fn remove(&mut self, worker: u64, number: u64, first: PageHash) {
        if let Some(prompts) = self.by_first.get_mut(&first) {
            prompts.retain(|prompt| (prompt.worker, prompt.number) != (worker, number));
            if prompts.is_empty() {
                self.by_first.remove(&first);
            }
        }
    }

    /// Calls `found` with each worker that will compute a prompt which begins like this one, and with how many leading pages they share.
    pub fn matches(&self, pages: &[PageHash], mut found: impl FnMut(u64, u32)) {
        let Some(prompts) = pages.first().and_then(|first| self.by_first.get(first)) else { return };
        let mut compared: HashMap<u64, usize> = HashMap::new();
        for prompt in prompts {
            let times = compared.entry(prompt.worker).or_default();
            if *times < COMPARED {
                *times += 1;
                found(prompt.worker, common(pages, &prompt.pages) as u32);
            }
        }
    }
}

/// Returns how many leading pages are the same; the first is.
fn common(a: &[PageHash], b: &[PageHash]) -> usize {
    let (mut same, mut different) = (1, a.len().min(b.len()) + 1);
    while same + 1 < different {
        let middle = (same + different) / 2;
        if a[middle - 1] == b[middle - 1] { same = middle } else { different = middle }
    }
    same
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_cache::page_hashes;

    /// A prompt whose pages differ from those of others from page `own` on.
    fn prompt(own: usize, name: u32, pages: usize) -> Arc<[PageHash]> {
        let tokens: Vec<u32> =
            (0..pages as u32).map(|page| if page < own as u32 { page } else { 1_000 + name }).collect();
        page_hashes(b"", &tokens, 1).into()
    }

    fn found(siblings: &Siblings, pages: &[PageHash]) -> Vec<(u64, u32)> {
        let mut found = Vec::new();
        siblings.matches(pages, |worker, shared| found.push((worker, shared)));
        found.sort_unstable();
        found
    }

    #[test]
    fn a_sibling_is_found_while_it_is_under_way() {
        let mut siblings = Siblings::default();
        let (a, b, new) = (prompt(7, 1, 10), prompt(3, 2, 30), prompt(9, 3, 20));
        siblings.add(4, 1, &a);
        siblings.add(5, 1, &b);
        siblings.add(5, 2, &prompt(0, 4, 5));
        siblings.add(5, 3, &Arc::from([]));
        assert_eq!(found(&siblings, &new), [(4, 7), (5, 3)]);
        siblings.remove(4, 1, a[0]);
        assert_eq!(found(&siblings, &new), [(5, 3)]);
        siblings.remove(5, 1, b[0]);
        siblings.remove(5, 2, prompt(0, 4, 5)[0]);
        assert!(found(&siblings, &new).is_empty() && siblings.by_first.is_empty());
    }

    #[test]
    fn work_is_bounded_at_each_worker() {
        let mut siblings = Siblings::default();
        (0..100).for_each(|number| siblings.add(1, number, &prompt(2, number as u32, 4)));
        siblings.add(2, 100, &prompt(2, 100, 4));
        assert_eq!(found(&siblings, &prompt(3, 500, 4)).len(), COMPARED + 1);
    }
}
