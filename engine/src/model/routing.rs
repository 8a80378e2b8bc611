//! Which experts a token goes to, and with what weight.
//!
//! Pure: scores in, choice out. Everything a family of mixtures of experts varies is a field: how logits become scores, which
//! groups of experts may be chosen from, whether the weights are made to add to one. Ties go to the lower index, so the choice
//! is a function of the token's logits alone.
//!
//! Sources: Mixtral (arXiv 2401.04088, section 2.1), DeepSeek-V2 (arXiv 2405.04434, section 2.2), DeepSeek-V3 (arXiv 2412.19437,
//! section 2.1.2).

/// Added to the sum of weights that are made to add to one, as the reference does.
const TINY: f32 = 1e-20;

/// How the tokens of a model are spread over the experts of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Routing {
    /// Experts of a layer.
    pub(crate) experts: usize,
    /// Experts that a token goes to.
    pub(crate) chosen: usize,
    pub(crate) scoring: Scoring,
    /// Groups of experts, of which a token uses only some.
    pub(crate) groups: Option<Groups>,
    /// A token's weights are made to add to one.
    pub(crate) normalise: bool,
    /// What every weight is multiplied by in the end.
    pub(crate) scale: f32,
}

/// How a logit becomes a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// The logistic function of each.
    Sigmoid,
}

/// Groups of neighbouring experts, of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    /// Groups of a layer; divides the number of experts.
    pub(crate) count: usize,
    /// Groups that a token may use.
    pub(crate) kept: usize,
    /// What a group is worth: the sum of its best `best` scores.
    pub(crate) best: usize,
}

/// An expert and its share in a token's output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) expert: u32,
    pub(crate) weight: f32,
}

impl Routing {
    /// Says which field, as `config.json` names it, cannot be.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (experts, chosen) = (self.experts, self.chosen);
        if experts == 0 || experts > 1 << 16 {
            return Err(format!("number of experts: {experts} is not between 1 and {}", 1 << 16));
        }
        if chosen == 0 || chosen > experts {
            return Err(format!("num_experts_per_tok: {chosen} of {experts} experts cannot be chosen"));
        }
        if !self.scale.is_finite() {
            return Err(format!("routed_scaling_factor: {} is not a number", self.scale));
        }
        let Some(Groups { count, kept, best }) = self.groups else { return Ok(()) };
        if count == 0 || !experts.is_multiple_of(count) {
            return Err(format!("n_group: {count} does not divide the number of experts, {experts}"));
        }
        if kept == 0 || kept > count {
            return Err(format!("topk_group: {kept} of {count} groups cannot be kept"));
        }
        let size = experts / count;
        if size < best || kept * size < chosen {
            return Err(format!("topk_group: {kept} groups of {size} experts leave less than the {chosen} to choose"));
        }
        Ok(())
    }

    /// Chooses the experts of one token.
    ///
    /// `scores` are the token's logits, `[experts]`, and become its scores. `correction`, `[experts]`, is added to what experts
    /// are chosen by and not to what they weigh. `ranks`, [`Routing::ranks`] long, is scratch. `choices`, `[chosen]`, come out best first.
    pub(crate) fn choose(
        &self,
        scores: &mut [f32],
        correction: Option<&[f32]>,
        ranks: &mut [f32],
        choices: &mut [Choice],
    ) {
        assert!(scores.len() == self.experts && ranks.len() == self.ranks() && choices.len() == self.chosen);
        let (ranks, worths) = ranks.split_at_mut(self.experts);
        self.score(scores);
        ranks.copy_from_slice(scores);
        if let Some(correction) = correction {
            ranks.iter_mut().zip(correction).for_each(|(rank, correction)| *rank += correction);
        }
        if let Some(groups) = self.groups {
            groups.restrict(ranks, worths);
        }
        for choice in &mut *choices {
            let expert = take_best(ranks);
            *choice = Choice { expert: expert as u32, weight: scores[expert] };
        }
        let sum: f32 = choices.iter().map(|choice| choice.weight).sum();
        for choice in choices {
            if self.normalise {
                choice.weight /= sum + TINY;
            }
            choice.weight *= self.scale;
        }
    }

    /// Returns the f32 that a choice needs to rank experts, and their groups, in.
    pub(crate) fn ranks(&self) -> usize {
        self.experts + self.groups.map_or(0, |groups| groups.count)
    }

    /// Turns logits into scores.
    fn score(&self, logits: &mut [f32]) {
        match self.scoring {
            Scoring::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
                let sum: f32 = logits.iter().sum();
                logits.iter_mut().for_each(|power| *power /= sum);
            }
            Scoring::Sigmoid => logits.iter_mut().for_each(|logit| *logit = 1.0 / (1.0 + (-*logit).exp())),
        }
    }
}

impl Groups {
    /// Makes the experts outside the best groups impossible to choose. `worths` is scratch, one for each group.
    fn restrict(&self, ranks: &mut [f32], worths: &mut [f32]) {
        let size = ranks.len() / self.count;
        worths.iter_mut().zip(ranks.chunks_exact(size)).for_each(|(worth, group)| *worth = self.worth(group));
        for _ in 0..self.kept {
            take_best(worths);
        }
        for (group, _) in ranks.chunks_exact_mut(size).zip(worths).filter(|(_, worth)| **worth != TAKEN) {
            group.fill(TAKEN);
        }
    }

    /// Returns the sum of the best one or two of a group.
    fn worth(&self, group: &[f32]) -> f32 {
        let mut top = [f32::MIN; 2];
        for rank in group {
            if *rank > top[0] {
                top = [*rank, top[0]];
            } else if *rank > top[1] {
                top[1] = *rank;
            }
        }
        top[..self.best].iter().sum()
    }
}

/// What marks a rank as gone: no score is as low.
const TAKEN: f32 = f32::NEG_INFINITY;

/// Finds the highest rank, the first of equals, and marks it as taken.
fn take_best(ranks: &mut [f32]) -> usize {
    let mut best = 0;
    for (index, rank) in ranks.iter().enumerate() {
        if *rank > ranks[best] {
            best = index;
        }
    }
    ranks[best] = TAKEN;
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Routing =
        Routing { experts: 6, chosen: 2, scoring: Scoring::Softmax, groups: None, normalise: false, scale: 1.0 };
    const SIGMOID: Routing = Routing { scoring: Scoring::Sigmoid, ..PLAIN };

    fn groups(count: usize, kept: usize, best: usize) -> Option<Groups> {
        Some(Groups { count, kept, best })
    }

    /// Chooses for one token and compares, weights within a millionth.
    fn check(routing: &Routing, logits: &[f32], correction: Option<&[f32]>, expected: &[(u32, f32)]) {
        let mut scores = logits.to_vec();
        let mut ranks = vec![0.0; routing.ranks()];
        let mut choices = vec![Choice::default(); routing.chosen];
        routing.check().expect("a good routing");
        routing.choose(&mut scores, correction, &mut ranks, &mut choices);
        let experts: Vec<u32> = choices.iter().map(|choice| choice.expert).collect();
        let wanted: Vec<u32> = expected.iter().map(|(expert, _)| *expert).collect();
        assert_eq!(experts, wanted, "{routing:?} {logits:?}");
        for (choice, (_, weight)) in choices.iter().zip(expected) {
            assert!((choice.weight - weight).abs() < 1e-6, "{choices:?}, expected {expected:?}");
        }
    }

    fn logit(probability: f32) -> f32 {
        (probability / (1.0 - probability)).ln()
    }

    #[test]
    fn softmax_weighs_by_all_experts() {
        let logits = [1.0f32, 2.0, 4.0, 3.0].map(f32::ln);
        let routing = Routing { experts: 4, ..PLAIN };
        check(&routing, &logits, None, &[(2, 0.4), (3, 0.3)]);
        check(&Routing { chosen: 4, ..routing.clone() }, &logits, None, &[(2, 0.4), (3, 0.3), (1, 0.2), (0, 0.1)]);
        // Mixtral: the softmax over the chosen two is the softmax over all, made to add to one.
        check(&Routing { normalise: true, ..routing.clone() }, &logits, None, &[(2, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        check(&Routing { scale: 2.5, ..routing }, &logits, None, &[(2, 1.0), (3, 0.75)]);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        check(&PLAIN, &[0.0; 6], None, &[(0, 1.0 / 6.0), (1, 1.0 / 6.0)]);
        let routing = Routing { groups: groups(3, 1, 1), ..PLAIN };
        check(&routing, &[0.0; 6], None, &[(0, 1.0 / 6.0), (1, 1.0 / 6.0)]);
        check(&SIGMOID, &[1.0, 0.0, 0.0, 2.0, 2.0, 0.0], None, &[(3, 0.880797), (4, 0.880797)]);
    }

    #[test]
    fn large_logits_stay_finite() {
        check(&PLAIN, &[1e30, 0.0, -1e30, 0.0, 0.0, 0.0], None, &[(0, 1.0), (1, 0.0)]);
        check(&SIGMOID, &[200.0, 0.0, -200.0, 0.0, 0.0, 0.0], None, &[(0, 1.0), (1, 0.5)]);
    }

    #[test]
    fn groups_are_worth_their_best() {
        // By maxima the groups are worth 0.5, 0.4 and 0.2; by the best two together 0.5, 0.6 and 0.4.
        let logits = [0.5, 0.0001, 0.4, 0.2, 0.2, 0.2].map(logit);
        let by_one = Routing { groups: groups(3, 1, 1), ..SIGMOID };
        check(&by_one, &logits, None, &[(0, 0.5), (1, 0.0001)]);
        let by_two = Routing { groups: groups(3, 1, 2), ..SIGMOID };
        check(&by_two, &logits, None, &[(2, 0.4), (3, 0.2)]);
        let two_groups = Routing { groups: groups(3, 2, 2), ..SIGMOID };
        check(&two_groups, &logits, None, &[(0, 0.5), (2, 0.4)]);
    }

    #[test]
    fn a_correction_changes_the_choice_and_not_the_weight() {
        let logits = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1].map(logit);
        let correction = [0.0, 0.0, 0.0, 0.35, 0.0, 0.0];
        check(&SIGMOID, &logits, Some(&correction), &[(3, 0.2), (0, 0.5)]);
        let normal = Routing { normalise: true, scale: 2.0, ..SIGMOID };
        check(&normal, &logits, Some(&correction), &[(3, 0.4 / 0.7), (0, 1.0 / 0.7)]);
        // Everyone's rank is below zero: experts of a group that is out stay out.
        let below = Routing { groups: groups(2, 1, 2), ..SIGMOID };
        check(&below, &logits, Some(&[-1.0; 6]), &[(0, 0.5), (1, 0.4)]);
    }

    #[test]
    fn what_is_not_a_number_does_no_harm() {
        let mut choices = [Choice::default(); 2];
        let routing = Routing { groups: groups(3, 1, 2), ..PLAIN };
        routing.choose(&mut [f32::NAN; 6], None, &mut [0.0; 9], &mut choices);
        assert!(choices.iter().all(|choice| choice.expert < 6));
    }

    #[test]
    fn impossible_numbers_are_named() {
        let check = |routing: Routing, words: &[&str]| {
            let problem = routing.check().expect_err("a bad routing");
            for word in words {
                assert!(problem.contains(word), "{problem:?} lacks {word:?}");
            }
        };
        check(Routing { experts: 0, ..PLAIN }, &["experts", "0"]);
        check(Routing { chosen: 7, ..PLAIN }, &["num_experts_per_tok", "7", "6"]);
        check(Routing { chosen: 0, ..PLAIN }, &["num_experts_per_tok", "0"]);
        check(Routing { scale: f32::INFINITY, ..PLAIN }, &["routed_scaling_factor", "inf"]);
        check(Routing { groups: groups(4, 1, 1), ..PLAIN }, &["n_group", "4", "6"]);
        check(Routing { groups: groups(3, 4, 1), ..PLAIN }, &["topk_group", "4", "3"]);
        check(Routing { groups: groups(6, 1, 1), ..PLAIN }, &["topk_group", "1", "2"]);
        check(Routing { groups: groups(6, 6, 2), ..PLAIN }, &["topk_group"]);
    }
}
