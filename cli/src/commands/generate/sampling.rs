//! Choosing a token by chance, the same for the same seed on every machine.

use crate::decoder::Next;
use serde::{Deserialize, Serialize};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sampling {
    /// Logits are divided by it; 0 takes the most probable token.
    pub(crate) temperature: f64,
    /// Only so many of the most probable tokens are considered; 0 for all.
    pub(crate) top_k: usize,
    /// Only the most probable tokens that together have this probability are considered.
    pub(crate) top_p: f64,
    pub(crate) seed: u64,
}

/// Draws tokens.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: SplitMix,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Sampler {
        Sampler { sampling, random: SplitMix(sampling.seed) }
    }

    pub(crate) fn choose(&mut self, next: &Next) -> i64 {
        match next {
            Next::Logits(logits) if self.sampling.temperature > 0.0 => self.draw(logits),
            _ => next.greedy(),
        }
    }

    fn draw(&mut self, logits: &[f32]) -> i64 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        let mut ranked: Vec<(usize, f64)> =
            logits.iter().enumerate().map(|(id, &x)| (id, f64::from(x) / temperature)).collect();
        // Equal logits in the order of their ids; not a number comes last.
        let key = |x: f64| if x.is_nan() { f64::NEG_INFINITY } else { x };
        ranked.sort_by(|a, b| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0)));
        if top_k > 0 {
            ranked.truncate(top_k);
        }
        let highest = ranked.first().map_or(0.0, |first| key(first.1));
        let mut weights: Vec<f64> = ranked.iter().map(|&(_, x)| (key(x) - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights.iter().position(|w| {
            reached += w / total;
            reached >= top_p
        });
        weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        let mut left = self.random.unit() * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        let chosen = chosen.unwrap_or(weights.len().saturating_sub(1));
        ranked.get(chosen).map_or(0, |&(id, _)| id as i64)
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
struct SplitMix(u64);

impl SplitMix {
    /// At least 0 and below 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: usize, top_p: f64) -> Sampler {
        Sampler::new(Sampling { temperature, top_k, top_p, seed: 7 })
    }

    fn counts(mut sampler: Sampler, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..10_000 {
            counts[sampler.choose(&Next::Logits(logits.to_vec())) as usize] += 1;
        }
        counts
    }

    #[test]
    fn tokens_come_as_often_as_they_are_probable() {
        let logits = [0.0, 1.0, f32::NEG_INFINITY, 2.0];
        let total: f64 = [0.0, 1.0, 2.0].iter().map(|x: &f64| x.exp()).sum();
        let counts = counts(sampling(1.0, 0, 1.0), &logits);
        for (logit, count) in logits.iter().zip(&counts) {
            let expected = 10_000.0 * f64::from(*logit).exp() / total;
            assert!((*count as f64 - expected).abs() < 150.0, "{counts:?}");
        }
    }

    #[test]
    fn the_improbable_can_be_left_out() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        assert_eq!(counts(sampling(0.0, 0, 1.0), &logits), [0, 0, 0, 10_000]);
        assert_eq!(counts(sampling(1.0, 2, 1.0), &logits)[..2], [0, 0]);
        // The two most probable have 0.88 of the probability.
        let kept = counts(sampling(1.0, 0, 0.8), &logits);
        assert!(kept[..2] == [0, 0] && kept[2] > 0, "{kept:?}");
        assert_eq!(counts(sampling(1.0, 0, 0.5), &logits), [0, 0, 0, 10_000]);
    }

    #[test]
    fn logits_that_are_no_numbers_are_never_chosen() {
        assert_eq!(counts(sampling(1.0, 0, 1.0), &[f32::NAN, 0.0]), [0, 10_000]);
    }

    #[test]
    fn a_seed_gives_the_same_tokens_again() {
        let draw = || {
            let mut sampler = sampling(1.0, 0, 1.0);
            (0..20).map(|_| sampler.choose(&Next::Logits(vec![0.0; 100]))).collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }
}
